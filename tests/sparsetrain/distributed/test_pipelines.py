"""Pipelines, with an engine for each stage; ZeRO; and replicas that are no longer equal."""

import functools
import re
from typing import Any

import pipelines
import pytest
from ranks import ranks
from sharded_runs import require_equal

FST = {"preset": "fst", "refresh_every": 2}


@functools.cache
def in_one_process() -> list[dict[str, Any]]:
    return pipelines.one_process(FST)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "shards"])
def test_each_stage_trains_as_in_one_process(sharded: bool) -> None:
    found = ranks(4)("pipelines.pipeline", FST, sharded=sharded)
    for rank, outcome in enumerate(found):
        stage = in_one_process()[rank // 2]
        losses = stage["losses"] if rank // 2 else [0.0] * pipelines.STEPS
        require_equal(outcome, {**stage, "losses": losses})
    assert found[0]["masks"].keys() != found[2]["masks"].keys()


def test_a_difference_is_found_by_the_replicas_of_its_stage_alone() -> None:
    found = [answer["error"] for answer in ranks(4)("pipelines.pipeline", FST, planted=True)]
    assert found[:2] == ["", ""]
    assert all("masks of 0.up differ between data-parallel ranks" in error for error in found[2:])


def test_torchs_own_schedule_of_micro_batches() -> None:
    for stage, outcome in enumerate(ranks(2)("pipelines.scheduled", FST)):
        wanted = {**in_one_process()[stage], "losses": []}
        require_equal({**outcome, "losses": []}, wanted, relative=1e-5)  # gradients of two halves are added up


@pytest.mark.parametrize(
    ("method", "kind"), [("fst", "AdamW"), ("asp_one_shot", "AdamW"), ("sr_ste", "SGD"), ("fst", "fused")]
)
def test_zero_trains_as_the_optimizer_inside_it(method: str, kind: str) -> None:
    options = {"preset": method} | ({"refresh_every": 2} if method != "asp_one_shot" else {"clear_moments": True})
    plain = ranks(2)("pipelines.data_parallel", options, False, kind)
    for found, wanted in zip(ranks(2)("pipelines.data_parallel", options, True, kind), plain, strict=True):
        require_equal(found, wanted)


def test_zero_resumes_where_it_stopped() -> None:
    plain = ranks(2)("pipelines.data_parallel", FST, False)
    for found, wanted in zip(ranks(2)("pipelines.data_parallel", FST, True, stop=7), plain, strict=True):
        require_equal(found, wanted)


@pytest.mark.parametrize(
    ("method", "overlap", "message"),
    [
        ({"preset": "slope", "adapter_rank": 4}, False, "adapters join its parameters later than it deals them out"),
        ({"preset": "step"}, False, "ZeroRedundancyOptimizer but"),
        ("fst", True, "overlap_with_ddp=True"),
    ],
)
def test_what_zero_cannot_do_is_refused_by_name(method: Any, overlap: bool, message: str) -> None:
    for found in ranks(2)("pipelines.zero_refused", method, overlap):
        assert re.search(f"^ValueError: optimizer is .*{message}", found), found


def test_a_difference_between_replicas_of_shards_is_found_by_those_that_hold_it() -> None:
    for rank, error in enumerate(ranks(4)("pipelines.planted_on_replicas")):
        held = "masks of 1.down differ between data-parallel ranks" in error
        assert held == (rank in (0, 2)), error
