import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sparsetrain.recipes.cli.main import main
from sparsetrain.recipes.cli.recipe_files import find_recipe, recipe_files

TINY = [
    "--model.width=32", "--model.depth=1", "--model.heads=2", "--model.context=16", "--data.context=16",
    "--data.max_bytes=100000", "--data.validation_blocks=64", "--trainer.accelerator=cpu", "--trainer.logger=false",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.mark.parametrize("name", [name for name in recipe_files() if name.startswith("gpt_")])
@pytest.mark.filterwarnings("ignore")
def test_every_recipe_trains(name: str, tmp_path: Path) -> None:
    short = ["--trainer.max_steps=24", "--trainer.val_check_interval=12", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", "--config", name, *TINY, *short]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert ("sparsetrain" in saved) == (name != "gpt_dense.yaml")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 24


@pytest.mark.filterwarnings("ignore")
def test_pruning_a_checkpoint_reports_dense_pruned_and_retrained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = [
        "--trainer.max_steps=150",
        "--trainer.val_check_interval=75",
        "--model.learning_rate=0.01",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert main(["fit", "--config", "gpt_dense", *TINY, *dense]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    out = tmp_path / "out"
    arguments = [
        "--checkpoint",
        str(checkpoint),
        "--steps",
        "30",
        "--output",
        str(out),
        "--trainer.val_check_interval=30",
    ]
    assert main(["prune", *arguments, *TINY]) == 0
    shown = capsys.readouterr().out
    assert "violations: 0" in shown
    rows = [line.split("|") for line in (out / "report.md").read_text().splitlines() if line.startswith("| ")][1:]
    losses = [float(row[3]) for row in rows]
    assert [row[2].strip() for row in rows] == ["dense", "pruned, mask frozen", "pruned, mask frozen", "final model"]
    assert losses[1] > losses[0]  # pruning costs
    assert losses[-1] < losses[1]  # retraining recovers
    weights = torch.load(out / "pruned.ckpt", weights_only=True)["state_dict"]
    assert (weights["model.blocks.0.mlp.up.weight"] == 0).float().mean() == 0.5
    assert (weights["model.blocks.0.attention.qkv.weight"] == 0).float().mean() < 0.01


@pytest.mark.filterwarnings("ignore")
def test_pruning_a_recipe_trains_dense_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--steps",
        "24",
        "--output",
        str(tmp_path),
        "--trainer.val_check_interval=8",
        "--trainer.num_sanity_val_steps=0",
    ]
    assert main(["prune", *arguments, *TINY]) == 0
    assert "kept fraction: 0.7" in capsys.readouterr().out
    rows = [line.split("|") for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ("8", "dense"), ("16", "pruned, mask frozen"), ("24", "pruned, mask frozen"), ("24", "final model"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--config", "nowhere.yaml"], ["'nowhere.yaml'", "gpt_dense.yaml"]),
        (
            ["prune", "--checkpoint", "nowhere.ckpt"],
            ["'nowhere.ckpt'", "is no file: pass the path of a checkpoint file."],
        ),
        (["prune", "--pattern", "row_wise"], ["--pattern goes with --checkpoint"]),
        (["fit", "--config", "gpt_dense", "--model.widht=3"], ["'widht'", "not accepted"]),
        (["fit", "--config", "gpt_dense", "--trainer.max_steps=abc"], ["trainer.max_steps", "abc", "int"]),
        (["fit", "--config", "gpt_from_scratch", "--trainer.callbacks.refresh=3"], ["'refresh'", "not accepted"]),
        (["fit", "--config", "gpt_from_scratch", "--trainer.callbacks.method=fts"], ["'fts'", "'asp_one_shot'"]),
        (["prune", "--model.widht=3"], ["'widht'", "not accepted"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_input_is_one_sentence_and_exit_code_2(arguments, words, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    (sentence,) = [line for line in message.splitlines() if line.startswith("sparsetrain: error: ")]
    assert len(sentence) < 400
    assert not sentence.endswith("..")
    assert "Traceback" not in message
    with pytest.raises(Exception):  # noqa: B017, PT011 - any error that is not swallowed will do
        main(["--debug", *arguments])


def test_help_names_every_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "sparsetrain.recipes.cli.main", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("recipes", "fit", "prune", "examples:"))


def test_recipes_are_listed_with_their_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "gpt_from_scratch.yaml" in capsys.readouterr().out
    assert find_recipe("gpt_dense") == str(recipe_files()["gpt_dense.yaml"])


@pytest.mark.filterwarnings("ignore")
def test_the_demo_writes_table_report_plot_checkpoints_and_an_offline_wandb_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sparsetrain.recipes.demo",
        "--steps",
        "40",
        "--width",
        "32",
        "--depth",
        "1",
        "--context",
        "32",
    ]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dense → prune" in done.stdout
    for name in ("report.md", "curves.png", "dense.ckpt", "recommended.ckpt", "asp_one_shot.ckpt",
                 "csv/recommended/metrics.csv"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 0
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3
    rows = [line.split("|") for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[6].strip() for row in rows] == ["0", "0", "0"]  # violations
    assert [row[7].strip() for row in rows] == ["dense", "2:4", "2:4"]
    assert "sparse from scratch: ends 2:4: 50.0 % zeros in " in done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from sparsetrain.recipes.cli.main import main; import sys; sys.exit(main(['recipes']) or 0)"
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([sys.executable, "-u", "-c", code], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    assert done.returncode == 1
