"""``SparseTrainingCallback`` under ``ModelParallelStrategy``: FSDP2, tensor parallelism and both, saved and resumed."""

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_parallel_runs as runs
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from model_parallel_runs import Shape
from ranks import ranks
from safetensors.torch import load_file
from sharded_runs import require_equal

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.callbacks.fit_checks import check_trainer
from sparsetrain.checkpoint.consolidation import Checkpoint, consolidate
from sparsetrain.methods import PRESETS

MOVING = {"preset": "fst", "refresh_every": 4, "decay": 0.01, "dense_tail": 0, "warmup": 2}

SLOPE = {"preset": "slope", "adapter_start": 2, "adapter_rank": 2}

SAVED, LOSSES_BEFORE = 5, 7
"""Step inside a period of masks, and losses until then, those of validation too."""

FSDP, TENSOR, BOTH = (2, 1), (1, 2), (2, 2)

BOUND = {FSDP: 0.0, TENSOR: 1e-6, BOTH: 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """A fit in one process."""
    return runs.fit(MOVING, saves={SAVED: str(folder / "alone.ckpt")})


@pytest.fixture(scope="module")
def sharded(folder: Path) -> list[dict[str, Any]]:
    """A fit of two shards, which saves on its way, and its end."""
    saves = {SAVED: str(folder / "shards"), 0: str(folder / "end")}
    found: list[dict[str, Any]] = ranks(2)("model_parallel_runs.fit", MOVING, FSDP, saves, gather="packed")
    return found


def fit(method: Any, shape: Shape, **options: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ranks(shape[0] * shape[1])("model_parallel_runs.fit", method, shape, **options)
    return found


def require_same(found: list[dict[str, Any]], wanted: dict[str, Any], bound: float = 0.0, skip: int = 0) -> None:
    for run in found:
        require_equal(run, {**wanted, "losses": wanted["losses"][skip:]}, bound)
        torch.testing.assert_close(run["ended"], wanted["ended"], rtol=bound, atol=bound)
        assert run["ending"] == wanted["ending"]


def require_consolidated(folder: Path, wanted: Mapping[str, Any]) -> None:
    path = folder.with_suffix(".safetensors")
    consolidate(folder, path, "state_dict")
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


def test_two_shards_train_as_one_process(alone: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    assert alone["ending"] == "ends 2:4: 50.0 % zeros in 6 layers"
    require_same(sharded, alone)


def test_the_first_rank_alone_logs_what_one_process_logs(alone: dict[str, Any], sharded: list[dict[str, Any]]) -> None:
    names = [key for key in alone["rows"][-1] if key.startswith("sparsity/") and not key.endswith(("_ms", "bytes"))]
    assert len(names) > 9
    for row, wanted in zip(sharded[0]["rows"], alone["rows"], strict=True):
        assert {key: row[key] for key in names if key in row} == pytest.approx(
            {key: wanted[key] for key in names if key in wanted}
        )
    assert sharded[1]["rows"] == []


@pytest.mark.parametrize("shape", [FSDP, TENSOR, BOTH], ids=["fsdp", "tensor", "both"])
def test_shards_go_on_inside_a_mask_period(
    folder: Path, alone: dict[str, Any], sharded: list[dict[str, Any]], shape: Shape
) -> None:
    require_same(fit(MOVING, shape, source=str(folder / "shards")), alone, BOUND[shape], LOSSES_BEFORE)


@pytest.mark.parametrize("shape", [FSDP, TENSOR], ids=["fsdp", "tensor"])
def test_a_file_of_one_process_goes_on_in_shards(folder: Path, alone: dict[str, Any], shape: Shape) -> None:
    require_same(fit(MOVING, shape, source=str(folder / "alone.ckpt")), alone, BOUND[shape], LOSSES_BEFORE)


def test_a_file_of_two_shards_goes_on_in_one_process(tmp_path: Path, alone: dict[str, Any]) -> None:
    path = str(tmp_path / "file.ckpt")
    require_same(fit(MOVING, FSDP, saves={SAVED: path}, in_shards=False), alone)
    require_same([runs.fit(MOVING, source=path)], alone, skip=LOSSES_BEFORE)


def test_a_checkpoint_holds_the_model_that_is_evaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[str, Any], sharded: list[dict[str, Any]]
) -> None:
    path = folder / "consolidated.ckpt"
    monkeypatch.setattr(sys, "argv", ["consolidate", str(folder / "shards"), "--output_file", str(path)])
    runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
    wanted = torch.load(folder / "alone.ckpt", weights_only=True)["state_dict"]
    for name, weight in runs.Blocks.load_from_checkpoint(path).state_dict().items():
        assert torch.equal(weight, wanted[name]), name
    assert not wanted["net.0.up.weight"].all()
    require_consolidated(folder / "shards", wanted)


@pytest.mark.parametrize("form", ["shared", "compiled"])
def test_a_weight_is_sparse_under_every_name_that_torch_gives_it(tmp_path: Path, form: str) -> None:
    wanted = runs.fit(MOVING, saves={SAVED: str(tmp_path / "alone.ckpt")}, form=form)
    weights = torch.load(tmp_path / "alone.ckpt", weights_only=True)["state_dict"]
    plain = {name.replace("_orig_mod.", ""): weight for name, weight in weights.items()}
    require_same(fit(MOVING, FSDP, saves={SAVED: str(tmp_path / "shards")}, form=form), wanted)
    require_consolidated(tmp_path / "shards", plain)
    if form != "compiled":  # whose checkpoints, dense ones too, Lightning does not load: the names are others
        require_same(fit(MOVING, FSDP, source=str(tmp_path / "shards"), form=form), wanted, skip=LOSSES_BEFORE)
    fit(MOVING, FSDP, saves={SAVED: str(tmp_path / "file.ckpt")}, in_shards=False, form=form)
    found = torch.load(tmp_path / "file.ckpt", weights_only=True)["state_dict"]
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        assert torch.equal(found[name], weight), name


def test_a_dense_checkpoint_is_pruned_as_it_was_loaded(tmp_path: Path) -> None:
    path, at_once = str(tmp_path / "dense.ckpt"), {"preset": "asp_one_shot", "prune_at": 0}
    runs.fit(MOVING, saves={1: path})
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sparsetrain"]
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="has no 'sparsetrain' state"):
        wanted = runs.fit(at_once, source=path)
    require_same(fit(at_once, FSDP, source=path), wanted)


def test_a_second_fit_and_what_is_saved_in_it_and_after_it_is_as_in_one_process(tmp_path: Path) -> None:
    def run(name: str, fit: Any) -> Any:
        within, end = (str(tmp_path / f"{name}-{when}") for when in ("within", "end"))
        twice = fit(saves={13: within, 0: end}, ends=(1, 2), track_age=True, validates=within)  # without the callback
        return twice, fit(source=end, ends=(3,))

    alone, again = run("alone", lambda **options: runs.fit(MOVING, **options))
    found, found_again = run("shards", lambda **options: fit(MOVING, FSDP, **options))
    require_same(found, alone)
    require_same(found_again, again)


@pytest.mark.parametrize(
    "method", [SLOPE, *(pytest.param(name, marks=pytest.mark.sweep) for name in PRESETS if name != "slope")], ids=str
)
def test_every_preset_goes_on_as_in_one_process(tmp_path: Path, method: Any) -> None:
    shards, file = tmp_path / "shards", str(tmp_path / "alone.ckpt")
    wanted = runs.fit(method, saves={4: file})
    require_same(fit(method, FSDP, saves={4: str(shards)}), wanted)
    saved, weights = Checkpoint(shards, "state_dict"), torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(saved.weight(name), weights[name]) for name in {*saved.weights, *weights})
    if method is SLOPE:
        with pytest.raises(ValueError, match="is of a method with adapters"):
            consolidate(shards, tmp_path / "model.safetensors", "state_dict")
    else:
        require_consolidated(shards, weights)
    require_same(fit(method, FSDP, source=str(shards)), wanted, skip=6)


def test_a_file_of_two_shards_with_adapters_goes_on_in_one_process(tmp_path: Path) -> None:
    alone, path = str(tmp_path / "alone.ckpt"), str(tmp_path / "file.ckpt")
    wanted = runs.fit(SLOPE, saves={4: alone})
    fit(SLOPE, FSDP, saves={4: path}, in_shards=False)
    weights, others = (torch.load(one, weights_only=True)["state_dict"] for one in (path, alone))
    assert all(torch.equal(weights[name], others[name]) for name in {*weights, *others})
    require_same([runs.fit(SLOPE, source=path)], wanted, skip=6)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy(), "^strategy is FSDPStrategy, but FSDP1 cuts .*: use ModelParallelStrategy, and fully_s"),
        (type("DeepSpeedStrategy", (), {})(), "^strategy is DeepSpeedStrategy, .* use ModelParallelStrategy"),
    ],
)
def test_what_cannot_be_sharded_is_refused(strategy: Any, message: str) -> None:
    trainer: Any = SimpleNamespace(callbacks=[], strategy=strategy)
    with pytest.raises(MisconfigurationException, match=message):
        check_trainer(trainer, SparseTrainingCallback)


def test_what_is_gathered_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match="gather is 'pakced': it must be one of"):
        SparseTrainingCallback(gather="pakced")  # type: ignore[arg-type]
