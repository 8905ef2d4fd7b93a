"""Runs on shards that ``torch.distributed.checkpoint`` saved go on, on other numbers of processes, bit for bit."""

import functools
from pathlib import Path
from typing import Any

import checkpointed_runs
import pytest
import sharded_runs
from checkpointed_runs import Shape
from ranks import RankError, ranks

from sparsetrain.methods import PRESETS

SAVED_AT = (1, 4, 7, 11)
"""In a dense head, sparse in mid-period, and frozen or in a dense tail, for one preset or another."""

METHODS: dict[str, Any] = {
    **{name: name for name in PRESETS},
    "slope": {"preset": "slope", "adapter_start": 5, "adapter_rank": 2},
}

TRANSITIONS: list[tuple[str, Shape, int, Shape]] = [
    ("fst", (2,), 4, ()),
    ("step", (2,), 4, (4,)),
    ("s_ste", (4,), 7, (2,)),
    ("asp_one_shot", (2,), 7, (2, 2)),
    ("fst", (), 1, (2,)),
    ("iterative", (2, 2), 11, (2,)),
    ("slope", (2,), 7, ()),
    ("slope", (2,), 7, (4,)),
]
"""Preset, mesh that saves, step, mesh that goes on."""


@functools.cache
def in_one_process(method: str) -> dict[str, Any]:
    return checkpointed_runs.run(METHODS[method])


def on(shape: Shape, method: str, **options: Any) -> list[dict[str, Any]]:
    """Run on a mesh, or in this process."""
    if not shape:
        return [checkpointed_runs.run(METHODS[method], **options)]
    world = functools.reduce(int.__mul__, shape)
    found: list[dict[str, Any]] = ranks(world)("checkpointed_runs.run", METHODS[method], shape, **options)
    return found


def require_same_end(method: str, step: int, found: list[dict[str, Any]]) -> None:
    whole = in_one_process(method)
    for run in found:
        sharded_runs.require_equal(run, {**whole, "losses": whole["losses"][step:]})


@pytest.mark.parametrize(("method", "before", "step", "after"), TRANSITIONS)
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, method: str, before: Shape, step: int, after: Shape
) -> None:
    on(before, method, saves={step: str(tmp_path)}, stop=step + 1)
    require_same_end(method, step, on(after, method, source=str(tmp_path)))


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("before", [(2,), (4,), (2, 2)])
def test_every_preset_goes_on_from_every_phase_on_every_mesh(tmp_path: Path, method: str, before: Shape) -> None:
    folders = {step: str(tmp_path / str(step)) for step in SAVED_AT}
    on(before, method, saves=folders)
    for step, folder in folders.items():
        for after in ((), (2,), (4,), (2, 2)):
            require_same_end(method, step, on(after, method, source=folder))


def test_what_was_killed_goes_on_from_the_last_checkpoint_with_fewer_processes(tmp_path: Path) -> None:
    folders = {step: str(tmp_path / str(step)) for step in (2, 5)}
    pool = ranks(4)
    with pytest.raises(RankError, match="died"):
        pool("checkpointed_runs.run", "fst", (4,), folders, kill_at=7)
    require_same_end("fst", 5, on((2,), "fst", source=folders[5]))
