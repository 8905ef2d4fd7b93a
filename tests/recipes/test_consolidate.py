"""``sparsetrain consolidate``: a sharded checkpoint as one dense file that computes what the sparse model did."""

import warnings
from pathlib import Path
from typing import Any

import checkpointed_runs
import pytest
import torch
from ranks import ranks
from safetensors.torch import load_file
from sharded_runs import batch, blocks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import sparsetrain as st
from sparsetrain.checkpoint.consolidation import consolidate
from sparsetrain.recipes.cli.main import main

HALF = {
    "asp_one_shot": {"preset": "asp_one_shot", "prune_at": 2},
    "s_ste": "s_ste",
    "fst": {"preset": "fst", "warmup": 2},
}


def checkpoint(folder: Path, method: Any = HALF["asp_one_shot"], steps: int = 5) -> torch.Tensor:
    """Save a run of one process, and return what its model computes."""
    run = checkpointed_runs.trained(method, steps=steps)
    checkpointed_runs.save(*run, str(folder))
    output: torch.Tensor = run[0](batch(0)).detach()
    return output


@pytest.mark.parametrize("method", HALF)
def test_the_file_computes_what_the_sparse_model_did(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, path = checkpoint(tmp_path / "saved", HALF[method]), tmp_path / "model.safetensors"
    assert main(["consolidate", str(tmp_path / "saved"), "--output", str(path)]) == 0
    model = blocks()
    model.load_state_dict(load_file(path))
    assert torch.equal(model(batch(0)), wanted)
    assert "0.up.weight" in (printed := capsys.readouterr().out)
    assert printed.count("256") >= 2  # of 512 entries
    weights = model.get_parameter("0.up.weight").detach()
    assert int((weights.view(-1, 4) != 0).sum(1).amax()) == 2


def test_a_checkpoint_of_shards_gives_the_file_of_one_process(tmp_path: Path) -> None:
    ranks(2)("checkpointed_runs.run", HALF["fst"], (2,), {5: str(tmp_path / "sharded")}, stop=6)
    checkpoint(tmp_path / "whole", HALF["fst"])
    for name in ("sharded", "whole"):
        assert main(["consolidate", str(tmp_path / name), "--output", str(tmp_path / f"{name}.safetensors")]) == 0
    sharded, whole = (load_file(tmp_path / f"{name}.safetensors") for name in ("sharded", "whole"))
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


class Shared(nn.Module):
    """A block that is used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = blocks()[0]  # type: ignore[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.second(self.first(x))
        return hidden


def compiled_block() -> nn.Module:
    model = blocks()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize("by_torch", [True, False], ids=["get_model_state_dict", "state_dict"])
@pytest.mark.parametrize(
    ("made", "plain", "pruned"),
    [
        (compiled_block, blocks, 7),
        (lambda: torch.compile(blocks(), backend="eager"), blocks, 7),
        (Shared, Shared, 6),
        (lambda: blocks().bfloat16(), lambda: blocks().bfloat16(), 7),
    ],
    ids=["compiled block", "compiled model", "shared module", "bfloat16"],
)
def test_the_file_has_the_names_of_the_dense_model_and_no_master(
    tmp_path: Path, made: Any, plain: Any, pruned: int, by_torch: bool
) -> None:
    model, dense = made(), plain()
    x = batch(0).to(next(dense.parameters()).dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, {"preset": "fst", "warmup": 1}, 12, verbose=False)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    weights = get_model_state_dict(model) if by_torch else model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointed_runs.save_all(
            {"model": weights, "training": training.sharded_state_dict()}, checkpoint_id=tmp_path / "saved"
        )
    path = tmp_path / "model.safetensors"
    assert len(consolidate(tmp_path / "saved", path)) == pruned
    dense.load_state_dict(load_file(path))
    assert torch.equal(dense(x), model(x))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "but it is a folder"),
        ("no/model", "but there is no folder"),
        ("/proc/model", "cannot be written: No such file"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_in_a_sentence(
    tmp_path: Path, output: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path / "saved")
    assert main(["consolidate", str(tmp_path / "saved"), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_dense_run_gives_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "saved", HALF["fst"], steps=1)
    assert main(["consolidate", str(tmp_path / "saved"), "--output", str(tmp_path / "out")]) == 0
    assert "no masks are in force" in capsys.readouterr().out
    dense = checkpointed_runs.trained(HALF["fst"], steps=1)[0].state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in load_file(tmp_path / "out").items())


@pytest.mark.filterwarnings("ignore:torch.distributed")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("empty", "is no checkpoint of torch.distributed.checkpoint"),
        ("dense", "holds no state of sparse training"),
        ("cut", "is damaged"),
        ("other model", "name the key of the model's state"),
    ],
)
def test_a_folder_that_cannot_be_turned_is_refused_in_a_sentence(
    tmp_path: Path, damage: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "saved", []
    folder.mkdir()
    if damage == "dense":
        checkpointed_runs.save_all({"model": blocks().state_dict()}, checkpoint_id=folder)
    elif damage != "empty":
        checkpoint(folder)
    if damage == "cut":
        for part in folder.glob("*.distcp"):
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    if damage == "other model":
        options = ["--model", "weights"]
    assert main(["consolidate", str(folder), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
