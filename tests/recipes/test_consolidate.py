"""``sparsetrain consolidate``: a sharded checkpoint as one dense file that computes what the sparse model did."""

from pathlib import Path
from typing import Any

import checkpointed_runs
import pytest
import torch
from ranks import ranks
from safetensors.torch import load_file
from sharded_runs import batch, blocks

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
