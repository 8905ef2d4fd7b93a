"""Metrics of sparse training in loggers: at every mask search, once a step, whatever the logging steps are."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_runs import Regression, batches

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.callbacks.metric_log import MetricLog
from sparsetrain.methods import PRESETS

MOVING = {"preset": "fst", "refresh_every": 3, "decay": 0.01, "dense_tail": 0, "warmup": 0}


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, key: str) -> list[tuple[int | None, float]]:
        return [(step, row[key]) for step, row in self.rows if key in row]


def fit(folder: Path, steps: int, callbacks: list[Callback], **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
    }  # fmt: skip
    checkpoint = options.pop("ckpt_path", None)
    seed_everything(3, verbose=False)
    trainer = Trainer(callbacks=callbacks, **{**defaults, **options})
    trainer.fit(Regression(), batches(), **({"ckpt_path": checkpoint, "weights_only": True} if checkpoint else {}))
    return trainer


def net(method: Any, **options: Any) -> SparseTrainingCallback:
    return SparseTrainingCallback(method, targets=[r"net\..*"], **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_of_metrics_has_all_that_a_run_returns(preset: str, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = fit(tmp_path, 8, [net(preset, track_age=True)], logger=recorder, log_every_n_steps=1)
    assert trainer.callback_metrics
    documented = set(re.findall(r"``(sparsity/\w+)``", MetricLog.__doc__ or ""))
    assert {key for _, row in recorder.rows for key in row if key.startswith("sparsity/")} <= documented


# the search of clock c is over at the end of the batch of step c - 1; that of clock 0 is logged with the first step
SEARCHES = [0, 2, 5, 8, 11]


@pytest.mark.parametrize("every", [0, 50, 4, 3, 1])
def test_every_search_reaches_every_logger_and_no_step_is_logged_twice(tmp_path: Path, every: int) -> None:
    recorder, other = Recorder(), Recorder()
    loggers = [recorder, other, CSVLogger(tmp_path)]
    trainer = fit(tmp_path, 13, [net(MOVING)], logger=loggers, log_every_n_steps=every)
    grid = {step for step in range(13) if every and (step + 1) % every == 0}
    expected = sorted(grid | set(SEARCHES))
    for logger in (recorder, other):
        assert [step for step, _ in logger.values("sparsity/kept_fraction")] == expected
        assert [clock for _, clock in logger.values("sparsity/clock")] == [step + 1 for step in expected]
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity/kept_fraction"]]
    assert [int(row["step"]) for row in rows] == expected
    assert float(trainer.callback_metrics["sparsity/flip_rate"]) == pytest.approx(
        recorder.values("sparsity/flip_rate")[-1][1]
    )
    assert "sparsity/flip_rate" in trainer.progress_bar_metrics
    assert trainer.callback_metrics["sparsity/kept_fraction"] == trainer.logged_metrics["sparsity/kept_fraction"]


def test_batches_that_only_accumulate_log_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    fit(tmp_path, 7, [net(MOVING)], logger=recorder, log_every_n_steps=2, accumulate_grad_batches=3)
    assert [step for step, _ in recorder.values("sparsity/clock")] == [0, 1, 2, 3, 5]
    assert [clock for _, clock in recorder.values("sparsity/clock")] == [1, 2, 3, 4, 6]


def test_values_equal_the_engine_s_own(tmp_path: Path) -> None:
    class Ask(Callback):
        def __init__(self) -> None:
            self.found: dict[int, dict[str, float]] = {}

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert callback.training is not None
            self.found[trainer.global_step - 1] = callback.training.metrics()

    recorder, ask, callback = Recorder(), Ask(), net(MOVING)
    fit(tmp_path, 9, [callback, ask], logger=recorder, log_every_n_steps=50)
    assert len(recorder.rows) == 4
    for step, row in recorder.rows:
        assert step is not None
        assert row == {f"sparsity/{key}": value for key, value in ask.found[step].items()}


def test_the_search_that_a_resumed_run_goes_on_from_is_not_logged_again(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    trainer = fit(tmp_path, 6, [net(MOVING, total_steps=12)], logger=first, log_every_n_steps=50)
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    again = [net(MOVING, total_steps=12)]
    fit(tmp_path, 12, again, logger=second, log_every_n_steps=50, ckpt_path=tmp_path / "six.ckpt")
    assert [step for step, _ in first.values("sparsity/clock")] == [0, 2, 5]
    assert [step for step, _ in second.values("sparsity/clock")] == [8, 11]


def test_a_callback_may_wait_for_a_value_that_is_logged_between_logging_steps(tmp_path: Path) -> None:
    stop = EarlyStopping("sparsity/kept_fraction", mode="max", patience=1, check_on_train_epoch_end=True)
    fit(tmp_path, 40, [net(MOVING), stop], logger=False, log_every_n_steps=50)
    assert stop.best_score.isfinite()


def test_after_pruning_once_one_sees_what_each_layer_lost(tmp_path: Path) -> None:
    recorder, dense = Recorder(), dense_weights(tmp_path, 4)
    method = {"preset": "asp_one_shot", "prune_at": 4, "pattern": "row_wise"}
    callback = net(method, per_layer_metrics=True, watch_dense=False)
    fit(tmp_path, 9, [callback], logger=recorder, log_every_n_steps=50)
    assert [step for step, _ in recorder.values("sparsity/clock")] == [3]
    kept = []
    for name in ("net.0", "net.2"):
        key = f"sparsity/layer/{name}/kept_fraction_at_refresh"
        ((_, found),) = recorder.values(key)
        groups = dense[f"{name}.weight"].double().abs().unflatten(1, (-1, 4)).sort(-1, descending=True).values
        expected = float(groups[..., :2].sum() / groups.sum())
        assert found == pytest.approx(expected, rel=1e-6)
        assert 0.5 < found < 0.95
        kept.append((float(groups[..., :2].sum()), float(groups.sum())))
    total = sum(part for part, _ in kept) / sum(whole for _, whole in kept)
    assert recorder.values("sparsity/kept_fraction_at_refresh") == [(3, pytest.approx(total, rel=1e-6))]


def dense_weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """The weights after steps of dense training, without the callback."""
    seed_everything(3, verbose=False)
    module = Regression()
    Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    ).fit(module, batches())  # fmt: skip
    return {name: value.detach() for name, value in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:ends 2.4")  # the first run stops before the second round
def test_what_layers_lost_stays_known_when_others_are_pruned_later_and_after_resuming(tmp_path: Path) -> None:
    method = {"preset": "iterative", "count": 2, "start": 2, "every": 2}

    def run(steps: int, **options: Any) -> tuple[dict[str, float], Trainer]:
        callback = net(method, total_steps=8, watch_dense=False)
        trainer = fit(tmp_path, steps, [callback], logger=False, **options)
        assert callback.training is not None
        found = callback.training.metrics(per_layer=True)
        return {key: value for key, value in found.items() if key.endswith("kept_fraction_at_refresh")}, trainer

    one, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    both, _ = run(8)
    layers = ["layer/net.0/kept_fraction_at_refresh", "layer/net.2/kept_fraction_at_refresh"]
    assert all(0.5 < both[key] < 0.95 for key in layers)
    assert any(one[key] == both[key] for key in layers)  # the first round's layer was not searched again
    resumed, _ = run(8, ckpt_path=tmp_path / "three.ckpt")
    assert resumed == both


def test_an_offline_wandb_run_has_every_search_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    calls: list[dict[str, float]] = []

    class Run:
        config: Any = type("Config", (), {"update": lambda *args, **kwargs: None})()

        def define_metric(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log(self, values: dict[str, float], **options: Any) -> None:
            calls.append(values)

    logger = WandbLogger(offline=True, save_dir=tmp_path)
    monkeypatch.setattr(WandbLogger, "experiment", Run())
    fit(tmp_path, 9, [net(MOVING)], logger=logger, log_every_n_steps=50)
    assert [row["trainer/global_step"] for row in calls] == [0, 2, 5, 8]  # one write a search
    assert all("sparsity/kept_fraction" in row for row in calls)


def test_other_ranks_than_the_first_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    trainer = fit(tmp_path, 5, [net(MOVING)], logger=recorder, log_every_n_steps=1)
    assert not recorder.values("sparsity/clock")
    assert trainer.callback_metrics["sparsity/clock"] == 5
