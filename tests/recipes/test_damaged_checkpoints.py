"""Files that are no checkpoint, or no checkpoint of the model, are refused by a sentence that names them."""

import io
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsetrain.recipes.cli.main import main
from sparsetrain.recipes.gpt import GPTModule

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"width": 16, "depth": 1, "heads": 2, "context": 8}
TINY = [
    *(f"--model.{key}={value}" for key, value in SIZES.items()), "--data.context=8", "--data.max_bytes=20000",
    "--data.validation_blocks=16", "--trainer.accelerator=cpu", "--trainer.logger=false",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=1",
]  # fmt: skip


class Unknown:
    """A class that no weights-only load takes."""


@pytest.fixture(autouse=True)
def _restore_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def weights() -> dict[str, Tensor]:
    return GPTModule(**SIZES).state_dict()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("some/file", b"text")
    return buffer.getvalue()


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.ckpt": (lambda: b"", "is empty"),
    "garbage.ckpt": (lambda: bytes(range(256)) * 8, "is no checkpoint, or a damaged one"),
    "text.ckpt": (lambda: b"hello\n", "is no checkpoint, or a damaged one"),
    "half.ckpt": (lambda: saved(weights())[: len(saved(weights())) // 2], "is no checkpoint, or a damaged one"),
    "short.ckpt": (lambda: saved(weights())[:-7], "is no checkpoint, or a damaged one"),
    "archive.ckpt": (zipped, "is no checkpoint, or a damaged one"),
    "pickle.ckpt": (lambda: pickle.dumps({"state_dict": {}}), "is no checkpoint, or a damaged one"),
    "module.ckpt": (lambda: saved(nn.Linear(2, 2)), "an object of torch.nn.modules.linear.Linear"),
    "class.ckpt": (lambda: saved({"state_dict": weights(), "more": Unknown()}), "Unknown"),
    "number.ckpt": (lambda: saved({"state_dict": 3}), "no 'state_dict' of tensors"),
    "nothing.ckpt": (lambda: saved({"epoch": 3}), "no 'state_dict' of tensors but the keys 'epoch'"),
    "list.ckpt": (lambda: saved([1, 2]), "no 'state_dict' of tensors but a list"),
    "tensor.ckpt": (lambda: saved(torch.ones(2)), "no 'state_dict' of tensors but a Tensor"),
    "bad.safetensors": (lambda: b"hello\n", "is no safetensors file"),
}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert "weights_only" not in shown.err
    lines = [line for line in shown.err.splitlines() if line.startswith("sparsetrain: error: ")]
    assert len(lines) == 1
    assert shown.err.rstrip().endswith(lines[0])  # and nothing behind it
    return lines[0]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_by_prune_and_by_fit(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = DAMAGED[name]
    path = tmp_path / name
    path.write_bytes(content())
    pruning = refusal(capsys, "prune", "--checkpoint", str(path), "--output", str(tmp_path / "out"), *TINY)
    assert f"checkpoint '{path}'" in pruning
    assert words in pruning
    assert not (tmp_path / "out").exists()
    if name in ("empty.ckpt", "half.ckpt", "module.ckpt", "nothing.ckpt"):  # fit reads with the same function
        going_on = refusal(capsys, "fit", "--config", "gpt_dense", *TINY, f"--ckpt_path={path}")
        assert f"ckpt_path '{path}'" in going_on
        assert words in going_on


def test_a_folder_and_a_name_that_is_nearly_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dense.ckpt").write_bytes(b"")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "dens.ckpt", "did you mean 'dense.ckpt'?")):
        assert words in refusal(capsys, "prune", "--checkpoint", str(path), *TINY)
        assert words in refusal(capsys, "fit", "--config", "gpt_dense", *TINY, f"--ckpt_path={path}")


def test_weights_of_another_model_are_named_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.ckpt"
    other = {name.replace("blocks", "layers"): value for name, value in weights().items()}
    for content in (other, GPTModule(**{**SIZES, "width": 32}).state_dict()):
        torch.save(content, path)
        line = refusal(capsys, "prune", "--checkpoint", str(path), *TINY)
        assert f"checkpoint '{path}' is of another model: 'model." in line
    torch.save(weights(), path)
    line = refusal(capsys, "fit", "--config", "gpt_dense", *TINY, f"--ckpt_path={path}")
    assert f"ckpt_path '{path}' holds weights and nothing else" in line
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(GPTModule(**SIZES))
    trainer.save_checkpoint(path, weights_only=True)
    checkpoint = {**torch.load(path, weights_only=True), "state_dict": other}
    torch.save(checkpoint, path)
    where = f"--trainer.default_root_dir={tmp_path}"
    for recipe in ("gpt_dense", "gpt_from_scratch"):
        line = refusal(capsys, "fit", "--config", recipe, *TINY, where, f"--ckpt_path={path}")
        assert f"ckpt_path '{path}' is of another model" in line
        assert len(line) < 400 + len(str(path))


@pytest.mark.parametrize("kind", ["plain.pt", "plain.safetensors"])
def test_weights_alone_are_pruned(kind: str, tmp_path: Path) -> None:
    path, given = tmp_path / kind, {name: value.clone() for name, value in weights().items()}  # none shared
    save_file(given, path) if kind.endswith("safetensors") else torch.save(given, path)
    frozen = ["--model.learning_rate=0", "--steps", "1", "--output", str(tmp_path / "out")]
    assert main(["prune", "--checkpoint", str(path), *frozen, *TINY]) == 0
    after = torch.load(tmp_path / "out" / "pruned.ckpt", weights_only=True)["state_dict"]
    name = "model.blocks.0.mlp.up.weight"
    kept = after[name] != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(after[name][kept], given[name][kept])


def test_a_checkpoint_to_go_on_from_is_no_business_of_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plain.pt"
    torch.save(weights(), path)
    assert "pass trained weights as --checkpoint" in refusal(capsys, "prune", *TINY, f"--ckpt_path={path}")
