"""States of runs on shards: DTensors out, any layout in, refused by all ranks or by none; and the ways out of a run."""

from pathlib import Path

import checkpointed_runs
import pytest
import torch
from checkpointed_runs import Shape
from ranks import ranks

import sparsetrain as st

WORLDS = {(2,): 2, (2, 2): 4}

OPTIONS = {"track_age": True}


def observing() -> st.Method:
    return st.methods.fst(criterion="movement", warmup=2)


def same(first: object, second: object) -> bool:
    """Compare states; numbers that were added up in another order may differ in the last bits."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list):
        return isinstance(second, list) and len(first) == len(second) and all(map(same, first, second))
    return first == (pytest.approx(second) if isinstance(second, float) else second)


@pytest.mark.parametrize("shape", WORLDS)
def test_the_gathered_state_of_shards_is_that_of_one_process(shape: Shape) -> None:
    wanted = checkpointed_runs.trained(observing(), **OPTIONS)[2].state_dict()
    for found, placements in ranks(WORLDS[shape])("checkpointed_runs.states", observing(), shape, **OPTIONS):
        assert same(found, wanted)
        kinds = {path.split(".")[1] for path in placements}
        assert kinds == {"codes", "ages", "criterion"}
        assert all("Shard(dim=0)" in where for where in placements.values())


@pytest.mark.parametrize("length", [6, 2])
def test_uneven_and_empty_parts_come_back(tmp_path: Path, length: int) -> None:
    for found in ranks(4)("checkpointed_runs.round_trip", str(tmp_path), length):
        assert found == [True] * 8


@pytest.mark.parametrize("form", ["whole", "cut otherwise"])
def test_a_state_loads_whole_and_from_dtensors_of_another_layout(form: str) -> None:
    state = checkpointed_runs.trained(observing(), **OPTIONS)[2].state_dict()
    for codes, flips in ranks(2)("checkpointed_runs.loaded", observing(), (2,), state, form, **OPTIONS):
        assert same(codes, state["codes"])
        assert flips == state["flips"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("codes", "codes of layer '0.up' are no row_wise masks"),
        ("clock", "clock is 5 on rank 0 but None on rank 1"),
        ("no tensor", "state['codes']['0.up'] is None"),
    ],
)
def test_a_part_that_is_damaged_on_one_rank_is_refused_on_every_rank(damage: str, words: str) -> None:
    first, second = ranks(2)("checkpointed_runs.refusals", "sr_ste", (2,), damage)
    assert first in (second, f"RuntimeError: rank 1 could not set up the state: {second.removeprefix('ValueError: ')}")
    assert words in second


@pytest.mark.parametrize("method", ["sr_ste", "s_ste", "asp_one_shot"])
def test_ways_out_of_a_run_on_shards_are_those_of_one_process(method: str) -> None:
    settings = {"asp_one_shot": {"preset": "asp_one_shot", "prune_at": 2}}.get(method, method)
    model, _, training = checkpointed_runs.trained(settings)
    evaluated, before = st.sparse_state_dict(model), model(checkpointed_runs.batch(0)).detach()
    training.finish()
    for found in ranks(2)("checkpointed_runs.exported", settings, (2,)):
        for way in ("evaluated", "changed", "detached"):
            assert same(dict(found[way]), dict(evaluated)), way
        assert "is whole but the model's weight is a DTensor" in found["refused"]
        assert found["restored"]
        assert same(dict(found["zeros"]), dict(model.state_dict()))
        for output in (found["before"], found["after"], found["again"]):
            torch.testing.assert_close(output, before)
