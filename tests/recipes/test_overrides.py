"""Command lines and recipes change single values of a preset, and what is printed gives the same objects again."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning_runs import Regression

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.criteria import Random
from sparsetrain.masks.gradient_rules import GradientRule
from sparsetrain.methods import Method, asp_one_shot, fst, iterative, recommended, slope
from sparsetrain.methods.schedule import Phase, Schedule
from sparsetrain.recipes.cli.main import main
from sparsetrain.recipes.cli.recipe_files import recipe_files

pytestmark = pytest.mark.filterwarnings("ignore")
CALLBACK = "sparsetrain.callbacks.SparseTrainingCallback"
QUIET = ["--trainer.logger=false", "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]
FROM_SCRATCH = {"warmup": 0.2, "dense_tail": 0.0, "refresh_every": 20, "decay": 0.5, "lr_factor": 2.0}
SHIPPED = {
    "gpt_dense_prune_retrain.yaml": (asp_one_shot, {"prune_at": 0.5, "pattern": "transposable", "restart_lr": False}),
    "gpt_from_scratch.yaml": (recommended, FROM_SCRATCH),
    "image_dense_prune_retrain.yaml": (
        asp_one_shot,
        {"prune_at": 0.5, "pattern": "transposable", "restart_lr": False},
    ),
    "image_from_scratch.yaml": (recommended, FROM_SCRATCH),
}


@pytest.fixture(autouse=True)
def _restore_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsetrain"])


def methods(*arguments: str) -> list[Method]:
    """The methods of the callbacks that a LightningCLI without anything of the package's makes."""
    cli = LightningCLI(
        Regression, run=False, args=[*QUIET, *arguments], save_config_callback=None,
        parser_kwargs={"exit_on_error": False},
    )  # fmt: skip
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    return [callback.method for callback in callbacks if isinstance(callback, SparseTrainingCallback)]


def recipe(folder: Path, method: Any) -> list[str]:
    entry: dict[str, Any] = {"class_path": CALLBACK, "init_args": {"targets": "net"}}
    if method is not None:
        entry["init_args"]["method"] = method
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"max_steps": 2, "callbacks": [entry]}}))
    return [f"--config={path}"]


def given(**values: Any) -> list[str]:
    return [f"--trainer.callbacks.method.{key}={value}" for key, value in values.items()]


def values_of(name: str) -> Any:
    """The method that a shipped recipe's file holds."""
    callbacks = yaml.safe_load(recipe_files()[name].read_text())["trainer"]["callbacks"]
    (found,) = (entry["init_args"]["method"] for entry in callbacks if entry["class_path"] == CALLBACK)
    return found


def test_every_shipped_recipe_with_the_callback_is_in_the_table() -> None:
    sparse = {name for name, path in recipe_files().items() if CALLBACK in path.read_text()}
    assert sparse == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_an_override_changes_one_value_of_a_shipped_preset(name: str, tmp_path: Path) -> None:
    preset, values = SHIPPED[name]
    start = recipe(tmp_path, values_of(name))
    overrides: dict[str, list[Any]] = {
        "pattern": ["row_wise"], "criterion": ["random"], "decay": [0.01], "hysteresis": [0.5], "refresh_every": [7],
    }  # fmt: skip
    if preset is asp_one_shot:
        overrides |= {"prune_at": [0.25, 3], "clear_moments": [False]}
    if name.startswith("image"):  # the same methods again
        overrides = {"pattern": ["row_wise"]}
    elif preset is recommended:
        overrides |= {"warmup": [0.5, 4], "dense_tail": [0], "decay": [1e-4]}
    for key, choices in overrides.items():
        for value in choices:
            (found,) = methods(*start, *given(**{key: value}))
            own = key in preset.__annotations__
            expected = preset(**{**values, **({key: value} if own else {})})
            plain = {**vars(expected), **({} if own else {key: value})}
            assert vars(found) == plain, (key, value)


LATER: list[tuple[str, Any, list[str], Callable[[], Method]]] = [
    ("a name, then a value", "asp_one_shot", given(prune_at=0.25), lambda: asp_one_shot(prune_at=0.25)),
    ("the default, then a value", None, given(decay=0.03), lambda: recommended(decay=0.03)),
    ("several values", {"preset": "fst", "warmup": 2}, given(decay="auto", warmup=100, mvue="true"),
     lambda: fst(warmup=100, decay="auto", mvue=True)),
    ("the same twice", "fst", [*given(decay=0.5), *given(decay=0.25)], lambda: fst(decay=0.25)),
    ("another preset", {"preset": "fst", "warmup": 2},
     ["--trainer.callbacks.method=slope", *given(adapter_rank=2)], lambda: slope(adapter_rank=2)),
    ("init_args spelled out", "fst", ["--trainer.callbacks.init_args.method.decay=0.5"], lambda: fst(decay=0.5)),
    ("a whole mapping", "fst", ['--trainer.callbacks.method={"preset": "iterative", "count": 2}'],
     lambda: iterative(count=2)),
    ("a callback that is added", None,
     [f"--trainer.callbacks={CALLBACK}", "--trainer.callbacks.method=fst", *given(decay=0.5)], lambda: fst(decay=0.5)),
    ("fields of Method", {"schedule": {"phases": [{"kind": "frozen"}]}, "name": "mine"}, given(pattern="row_wise"),
     lambda: Method(name="mine", pattern="row_wise", schedule=Schedule((Phase("frozen"),)))),
    ("objects", {"preset": "asp_one_shot", "criterion": {"class_path": "sparsetrain.Random", "init_args": {"seed": 5}},
                 "gradient": {"kept": 1.0, "pruned": 0.5}}, given(prune_at=3),
     lambda: Method(**{**vars(asp_one_shot(prune_at=3)), "criterion": Random(5), "gradient": GradientRule(1.0, 0.5)})),
]  # fmt: skip


@pytest.mark.parametrize(("start", "later", "expected"), [case[1:] for case in LATER], ids=[case[0] for case in LATER])
def test_an_override_changes_one_value_wherever_the_preset_comes_from(
    start: Any, later: list[str], expected: Callable[[], Method], tmp_path: Path
) -> None:
    found = methods(*recipe(tmp_path, start), *later)
    assert found == [expected()]


def test_an_added_callback_has_its_own_preset(tmp_path: Path) -> None:
    added = [f"--trainer.callbacks+={CALLBACK}", "--trainer.callbacks.method=fst", *given(decay=0.5)]
    assert methods(*recipe(tmp_path, "asp_one_shot"), *added) == [asp_one_shot(), fst(decay=0.5)]


@pytest.mark.parametrize(
    ("start", "later", "words"),
    [
        ("fst", given(warmpu=3), ["'warmpu'", "did you mean 'warmup'?"]),
        ("asp_one_shot", given(warmpu=3), ["asp_one_shot has no argument 'warmpu'", "did you mean 'warmup'?"]),
        ({"preset": "fst", "warmpu": 3}, [], ["'warmpu'", "did you mean 'warmup'?"]),
        ("asp_one_shot", given(warmup=3), ["'warmup'", "one of fst", "prune_at", "preset='fst'"]),
        ("fst", given(start="scratch"), ["'start'", "one of iterative, recommended"]),
        ("fst", ["--trainer.callbacks.method=fts"], ["'fts'", "did you mean 'fst'?"]),
        ({"preset": "asp_one_shot", "prune_at": 3}, given(preset="fst"), ["'prune_at'", "method=fst"]),
        ("fst", given(criterion="magnitud"), ["did you mean 'magnitude'?"]),
        ("fst", given(pattern="row-wise"), ["did you mean 'row_wise'?"]),
        ({"schedule": [{"kind": "sparse", "lenght": 3}]}, [], ["'lenght'", "did you mean 'length'?"]),
        ({"gradient": {"kpt": 3}}, [], ["'kpt'", "kept and pruned"]),
    ],
)
def test_a_name_of_neither_the_preset_nor_method_is_refused(
    start: Any, later: list[str], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - jsonargparse wraps it
        methods(*recipe(tmp_path, start), *later)
    assert all(word in str(caught.value) for word in words), caught.value


def printed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--print_config"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("start", "overrides", "expected"),
    [
        ("gpt_dense_prune_retrain", given(pattern="row_wise"), {"preset": "asp_one_shot", "prune_at": 0.5,
                                                              "pattern": "row_wise", "restart_lr": False}),
        ("image_from_scratch", ["--trainer.callbacks.method=fst", *given(decay="auto")],
         {"preset": "fst", "decay": "auto"}),
    ],
)  # fmt: skip
def test_a_printed_config_gives_the_same_again_to_fit_and_to_prune(
    start: str, overrides: list[str], expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = printed("fit", "--config", start, *overrides, capsys=capsys)
    assert "Unable to serialize" not in first
    assert yaml.safe_load(first)["trainer"]["callbacks"][0]["init_args"]["method"] == expected
    (tmp_path / "printed.yaml").write_text(first)
    assert printed("fit", f"--config={tmp_path / 'printed.yaml'}", capsys=capsys) == first
    pruning = yaml.safe_load(printed("prune", "--config", str(tmp_path / "printed.yaml"), capsys=capsys))
    again = yaml.safe_load(first)
    pruning["trainer"]["default_root_dir"] = again["trainer"]["default_root_dir"]  # prune has a folder of its own
    assert pruning == again


def test_a_config_that_would_be_refused_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "gpt_from_scratch", *given(warmpu=3), "--print_config"]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert "did you mean 'warmup'?" in shown.err


def test_the_config_that_a_fit_saves_gives_the_same_method(tmp_path: Path) -> None:
    tiny = [
        "--model.width=16", "--model.depth=1", "--model.heads=2", "--model.context=8", "--data.context=8",
        "--data.max_bytes=20000", "--data.validation_blocks=16", "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0",
    ]  # fmt: skip
    quiet = [*QUIET[:2], *tiny]
    where = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    override = given(pattern="row_wise")
    assert main(["fit", "--config", "gpt_dense_prune_retrain", *quiet, *where, *override]) == 0
    saved = tmp_path / "config.yaml"
    method = yaml.safe_load(saved.read_text())["trainer"]["callbacks"][0]["init_args"]["method"]
    assert method == {"preset": "asp_one_shot", "prune_at": 0.5, "pattern": "row_wise", "restart_lr": False}
    out = tmp_path / "out"
    assert main(["prune", "--config", str(saved), *quiet, "--steps", "4", "--output", str(out)]) == 0
    weight = torch.load(out / "pruned.ckpt", weights_only=True)["state_dict"]["model.blocks.0.mlp.up.weight"]
    kept = weight != 0
    assert (kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()  # along rows
    assert not (kept.unflatten(0, (-1, 4)).sum(1) == 2).all()  # and along rows alone


def test_a_method_object_in_a_program_s_defaults_is_written_as_its_fields() -> None:
    from sparsetrain.callbacks.method_argument import as_mapping
    from sparsetrain.methods import resolve_method

    for method in (fst(warmup=3), asp_one_shot(), slope(), iterative(by="density"), Method(criterion="wanda")):
        plain = as_mapping(method)
        assert yaml.safe_load(yaml.safe_dump(plain)) == plain
        assert resolve_method(plain).describe() == method.describe()
    with pytest.raises(ValueError, match=r"Random\(seed=3\), which has no plain name"):
        as_mapping(Method(criterion=Random(3)))
