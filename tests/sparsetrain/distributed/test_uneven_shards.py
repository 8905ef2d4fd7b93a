"""Shards of unequal size, and ranks that hold nothing of a layer, train as one process does."""

import functools
import itertools
from typing import Any

import pytest
import sharded_runs
from crosses import crossed
from ranks import ranks

METHODS: dict[str, Any] = {
    "fst": "fst",
    "asp_one_shot": {"preset": "asp_one_shot", "criterion": "wanda"},
    "s_ste": "s_ste",
    "recommended": {"preset": "recommended", "criterion": "fisher"},
}


HIDDEN = (16, 36)
"""Features inside of blocks: over five ranks, one holds nothing of these, or half of what the others do."""


@functools.cache
def in_one_process(method: str, hidden: int) -> dict[str, Any]:
    return sharded_runs.train(sharded_runs.blocks(2, 16, hidden), METHODS[method])


@pytest.mark.parametrize(
    ("hidden", "method"),
    crossed(itertools.product(HIDDEN, METHODS), lambda hidden, method: hidden == 16 or method == "fst"),
)
def test_shards_of_unequal_size_change_nothing(hidden: int, method: str) -> None:
    for found in ranks(5)("pipelines.uneven", hidden, METHODS[method]):
        sharded_runs.require_equal(found, in_one_process(method, hidden), relative=1e-6)  # fifths of sums


@pytest.mark.parametrize(("hidden", "gather"), [(16, "masked"), (36, "packed")])
def test_shards_of_unequal_size_may_be_converted(hidden: int, gather: str) -> None:
    for found in ranks(5)("pipelines.uneven_and_converted", hidden, "fst", gather=gather):
        sharded_runs.require_equal(found, in_one_process("fst", hidden), relative=1e-6)


def test_what_no_run_has_taken_note_of_may_not_be_converted() -> None:
    for message in ranks(5)("refused_runs.converted_too_early"):
        assert "'SparseLinear' is sharded in uneven parts and was converted before a run's step" in message


@pytest.mark.parametrize("method", METHODS)
def test_a_mesh_of_one_rank_is_one_process(method: str) -> None:
    (found,) = ranks(1)("pipelines.uneven", 16, METHODS[method])
    sharded_runs.require_equal(found, in_one_process(method, 16))
