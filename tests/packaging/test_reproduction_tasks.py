"""The tasks of ``scripts/reproduce_methods``: all of them, each with a tiny model."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reproduction_runs import Load
from script_modules import REPRODUCTION, importable

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback


@pytest.fixture
def load():
    with importable(REPRODUCTION) as load:
        yield load


TINY = ["gpt", "llama", "image", "vit", "efficientnet", "encoder", "last-blocks"]


def test_every_task_has_its_rows_and_tells_itself_from_the_others(load: Load) -> None:
    tasks, methods = load("tasks").TASKS, load("methods").METHODS
    every = [task for models in tasks.values() for task in models.values()]
    assert len({task.name for task in every}) == len(every)
    assert len({json.dumps(task.describe(), sort_keys=True, default=repr) for task in every}) == len(every)
    assert all(set(task.rows) <= set(methods) for task in every)
    assert all("dense" in (task.rows or methods) for task in every)
    assert [name for name, models in tasks.items() if "tiny" in models] == TINY


@pytest.mark.parametrize("name", [TINY[0], *(pytest.param(name, marks=pytest.mark.sweep) for name in TINY[1:])])
def test_a_tiny_run_of_every_task(load: Load, name: str) -> None:
    task = replace(load("tasks").TASKS[name]["tiny"], steps=10)
    run = load("training").train(task, "recommended", load("methods").build({"preset": "recommended"}), 0)
    assert (run.ends, run.violations, run.steps) == ("2:4", 0, 10)
    assert run.steps_share() == pytest.approx(0.8)
    assert all(math.isfinite(validation.loss) for validation in run.validations)
    assert all((validation.accuracy is not None) == bool(task.accuracy) for validation in run.validations)


@pytest.mark.parametrize(
    ("task", "package"), [("encoder", "MINILM"), ("last-blocks", "SMOLLM2"), ("efficientnet", "EFFICIENTNET")]
)
def test_a_task_whose_model_is_not_installed_says_what_to_install(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: str,
    package: str,
) -> None:  # fmt: skip
    main = load("main")
    monkeypatch.setattr(load(task.replace("-", "_")), package, "gt-nothing")
    words = ["--model", "small", "--steps", "2", "--seeds", "1", "--method", "dense", "--runs", str(tmp_path / "runs")]
    assert main.main([*words, "--task", task, "--out", str(tmp_path / "out")]) == 1
    assert "this task needs the package gt-nothing: pip install" in capsys.readouterr().err


def test_dense_training_may_freeze_its_moments_as_the_control_of_step(load: Load) -> None:
    task, methods, train = replace(load("tasks").TASKS["gpt"]["tiny"], steps=8), load("methods"), load("training").train
    entry = methods.METHODS["dense, second moments frozen half-way"]
    method = methods.build(entry)
    frozen, plain = train(task, "a", method, 0, entry), train(task, "b", method, 0)
    assert [one.loss == two.loss for one, two in zip(frozen.validations, plain.validations, strict=True)] == (
        [True] * 4 + [False] * 4
    )
    job = load("jobs").Job(task, "a", entry, 0)
    assert job.key("") != replace(job, entry=methods.METHODS["dense"]).key("")


def test_dense_training_may_have_the_learning_rate_of_recommended_as_its_control(load: Load) -> None:
    controls = load("controls")
    entry = load("methods").METHODS["dense, twice the learning rate in sparse layers"]
    model, rate = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)), 0.5
    weight, callback = model[0].weight, SparseTrainingCallback()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    method = load("methods").build(entry)
    callback.training = st.SparseTraining(model, optimizer, method, 10, targets="all-linear", verbose=False)
    (control,) = controls.controls_of(entry, callback, 10)
    for step, factor in enumerate((1.0, 1.0, 2.0), 1):
        weight.grad, before = torch.randn(4, 4), weight.detach().clone()
        control.on_before_optimizer_step(None, model, optimizer)
        optimizer.step()
        control.on_train_batch_end(SimpleNamespace(global_step=step), model)
        torch.testing.assert_close(weight.detach(), before - factor * rate * weight.grad)
    assert controls.controls_of({"preset": "recommended"}, callback, 10) == []


def test_the_loss_of_a_task_is_scaled_in_training_alone(load: Load) -> None:
    task = load("tasks").TASKS["gpt-loss-x10"]["small"]
    model = task.module(**{**task.module_options, "width": 32, "depth": 1, "context": 8})
    plain = load("tasks").GPTModule(width=32, depth=1, heads=4, context=8)
    plain.load_state_dict(model.state_dict())
    batch = torch.randint(0, 256, (2, 9))
    model.log = plain.log = lambda *_, **__: None
    torch.testing.assert_close(model.training_step(batch, 0), 10 * plain.training_step(batch, 0))
    torch.testing.assert_close(model.loss(batch), plain.loss(batch))
