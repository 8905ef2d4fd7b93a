"""A mistyped word on the command line or in a recipe is answered by one sentence with the word that was meant."""

import sys
from pathlib import Path

import pytest

from sparsetrain.checks.suggestions import did_you_mean, nearest
from sparsetrain.recipes.cli.main import main
from sparsetrain.recipes.cli.messages import explain
from sparsetrain.recipes.cli.recipe_files import recipe_files

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _restore_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert not shown.out
    (line,) = [line for line in shown.err.splitlines() if line and not line.startswith("INFO")]
    assert line.startswith("sparsetrain: error: ")
    assert len(line) < 450
    return line


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("max_steps:", "max_step:", ["'trainer.max_step'", "did you mean 'trainer.max_steps'?"]),
        ("trainer:", "triner:", ["'triner.max_steps'", "did you mean 'trainer.max_steps'?"]),
        ("warmup:", "warmpu:", ["'warmpu'", "did you mean 'warmup'?"]),
        ("width:", "widht:", ["model", "'widht'", "GPTModule", "did you mean 'width'?"]),
        ("targets:", "target:", ["trainer.callbacks", "'target'", "did you mean 'targets'?"]),
        ("init_args:\n    width", "init_arg:\n    width", ["'init_arg.width'", "did you mean 'init_args.width'?"]),
        ("SparseTrainingCallback", "SparseTrainingCallbak", ["did you mean 'SparseTrainingCallback'?"]),
        ("sparsetrain.recipes.gpt.", "sparsetran.recipes.gpt.", ["sparsetran", "did you mean 'sparsetrain'?"]),
        ("width: 128", "width: wide", ["model.width is 'wide'", "must be int"]),
        ("targets: mlp", "targets: 3", ["trainer.callbacks.targets is '3'", "must be str or list"]),
        ("width: 128", "width: [128", ["recipe.yaml", "is no YAML in line 10"]),
        ("  class_path: sparsetrain.recipes.gpt", "\tclass_path: sparsetrain.recipes.gpt", ["is no YAML in line 7"]),
    ],
)
def test_a_typo_in_a_recipe(
    right: str, wrong: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = recipe_files()["gpt_from_scratch.yaml"].read_text()
    assert right in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(right, wrong))
    line = refusal(capsys, "fit", f"--config={path}")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fti"], ["'fti'", "did you mean 'fit'?"]),
        (["recipe"], ["did you mean 'recipes'?"]),
        (["--debg", "fit"], ["--debg", "did you mean '--debug'?"]),
        (["recipes", "x"], ["'x'"]),
        (["doctor", "--prob"], ["did you mean '--probe'?"]),
        (["doctor", "--dtype", "bfloat"], ["did you mean 'bfloat16'?"]),
        (["fit", "--config", "gpt_from_scrach.yaml"], ["did you mean 'gpt_from_scratch.yaml'?"]),
        (["fit", "--config=gpt_dens"], ["'gpt_dens'", "did you mean 'gpt_dense.yaml'?"]),
        (["prune", "--chekpoint", "x"], ["--chekpoint", "did you mean '--checkpoint'?"]),
        (["prune", "--checkpoint", "x", "--pattern", "rowwise"], ["did you mean 'row_wise'?"]),
        (["fit", "--config", "gpt_dense", "--trainer.max_step=3"], ["did you mean '--trainer.max_steps'?"]),
        (["fit", "--config", "gpt_dense", "--ckpt_pth=3"], ["did you mean '--ckpt_path'?"]),
        (["fit", "--config", "gpt_dense", "--trainer.callbacks=ModelCheckpont"], ["did you mean 'ModelCheckpoint'?"]),
        (["fit", "--config", "gpt_dense", "--optimizer=Adm"], ["optimizer", "did you mean 'Adam'?"]),
        (["fit", "--config", "gpt_dense", "--trainer.precision=bf16-mixd"], ["did you mean 'bf16-mixed'?"]),
        (["fit", "--config", "gpt_from_scratch", "--trainer.callbacks.backend=maskd"], ["did you mean 'masked'?"]),
    ],
)
def test_a_typo_on_the_command_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [
        "--model.width=16", "--model.depth=1", "--model.heads=2", "--data.max_bytes=100000", "--trainer.logger=false",
        "--data.validation_blocks=16", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    line = refusal(capsys, *arguments, *(tiny if "--trainer.callbacks.backend=maskd" in arguments else []))
    assert all(word in line for word in words), line
    assert not line.endswith("..")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"hello\n", ["holds no keys"]),
        (bytes(range(256)), ["no YAML", "bytes"]),
        (b"a: b: c\n", ["no YAML in line 1, column 5"]),
    ],
)
def test_a_file_that_is_no_recipe(
    content: bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.yaml"
    path.write_bytes(content)
    line = refusal(capsys, "fit", "--config", str(path))
    assert all(word in line for word in ["some.yaml", *words]), line
    assert "is a folder" in refusal(capsys, "fit", "--config", str(tmp_path))
    assert "did you mean 'some.yaml'?" in refusal(capsys, "fit", "--config", str(tmp_path / "sme.yaml"))


def test_a_sentence_stays_as_it_is_and_lines_are_joined() -> None:
    assert explain("decay is 3: it must be less.") == "decay is 3: it must be less."
    assert explain("one\n  two") == "one two"
    assert explain("") == ""


def test_nearest_words() -> None:
    assert nearest("Warmpu", ["decay", "warmup", "warm"], 2) == ["warmup", "warm"]
    assert nearest(3, ["3"]) == nearest("x", ["warmup"]) == []
    assert did_you_mean("x", ["warmup"]) == ""
