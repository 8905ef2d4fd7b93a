"""One run: a task by one method with one seed."""

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import Method

from .controls import controls_of
from .tasks import Task

VALIDATIONS = 10
"""Of a run, about."""

NOTHING: Mapping[str, Any] = {}


class Validation(NamedTuple):
    """A validation: after which step, the loss, and the accuracy if the task has one."""

    step: int
    loss: float
    accuracy: float | None = None


@dataclass
class Run:
    """What a run is compared by.

    Args:
        task: The task's name.
        method: The row's name.
        seed: Of the weights and the batches.
        validations: In order; the last one is of the finished model.
        shares: Of the GEMM FLOPs that could run sparse, in each step.
        masked: Whether any mask was in force, in each step.
        taught: Whether a teacher's forward came on top, in each step.
        violations: Most groups of four with a wrong mask at any mask search or at the end; must be 0.
        ends: ``"2:4"`` or ``"dense"``: what the finished model's weights are.
        seconds: Of training, validation included.
        environment: Where it ran.
        commit: Of what it ran.
        dense: Final loss of the dense run of the same seed that was made with it; None if there was none.
    """

    task: str
    method: str
    seed: int
    validations: list[Validation]
    shares: list[float]
    masked: list[bool]
    taught: list[bool]
    violations: int
    ends: str
    seconds: float
    environment: str = ""
    commit: str = ""
    dense: float | None = None

    @property
    def final(self) -> float:
        """The last validation loss."""
        return self.validations[-1].loss

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return len(self.shares)

    def flops_share(self, steps: int | None = None) -> float:
        """Return the share of GEMM FLOPs that could run sparse, of the first so many steps or of all."""
        done = self.shares[:steps]
        return sum(done) / len(done) if done else 0.0

    def steps_share(self, steps: int | None = None) -> float:
        """Return the share of steps in which a mask was in force, of the first so many or of all."""
        done = self.masked[:steps]
        return sum(done) / len(done) if done else 0.0


class Watch(Callback):
    """Collects validations, the share of sparse FLOPs of every step, and wrong masks; after the sparse callback."""

    def __init__(self, callback: SparseTrainingCallback, accuracy: str) -> None:
        self.validations: dict[int, Validation] = {}
        self.shares: list[float] = []
        self.masked: list[bool] = []
        self.taught: list[bool] = []
        self.violations = 0
        self._callback = callback
        self._accuracy = accuracy

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Ask while the step's phase is in force."""
        training = self._callback.training
        assert training is not None
        self.shares.append(training.sparse_flops_share)
        self.masked.append(any(layer.is_masked for layer in training.masks.layers.values()))
        self.taught.append(self.masked[-1] and training.method.distillation > 0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Count the wrong groups of masks that were just searched."""
        training = self._callback.training
        if training is not None and training.refreshed:
            self.violations = max(self.violations, training.masks.violations())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect a validation; that of the finished model takes the place of the fit's last one."""
        metrics, step = trainer.callback_metrics, trainer.global_step
        accuracy = float(metrics[self._accuracy]) if self._accuracy else None
        self.validations[step] = Validation(step, float(metrics["val/loss"]), accuracy)


def train(task: Task, name: str, method: Method, seed: int, controls: Mapping[str, Any] = NOTHING) -> Run:
    """Train one model; the same seed gives every method the same weights and the same batches.

    Args:
        task: What is trained.
        name: Of the row.
        method: By which.
        seed: Any integer.
        controls: What :func:`.controls.controls_of` takes.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*too few to adjust it")  # as a trial of some steps is
        return _train(task, name, method, seed, controls)


def _train(task: Task, name: str, method: Method, seed: int, controls: Mapping[str, Any]) -> Run:
    seed_everything(seed, verbose=False)
    data = task.data(**task.data_options, seed=seed)
    model = task.module(**task.module_options)
    targets = task.targets if isinstance(task.targets, str) else list(task.targets)
    callback = SparseTrainingCallback(method, targets=targets, total_steps=task.steps)
    watch = Watch(callback, task.accuracy)
    trainer = Trainer(
        max_steps=task.steps,
        max_epochs=-1,
        devices=1,
        precision=task.precision,
        logger=False,
        callbacks=[callback, watch, *controls_of(controls, callback, task.steps)],
        gradient_clip_val=1.0,
        val_check_interval=max(1, task.steps // VALIDATIONS),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    training = callback.training
    if training is None or len(watch.shares) != task.steps:
        raise RuntimeError(f"the run ended after {len(watch.shares)} of {task.steps} steps: it was interrupted.")
    trainer.validate(model, data, verbose=False)
    violations = max(watch.violations, int(training.metrics()["violations"]))
    sparse = [model.get_submodule(choice.name) for choice in training.report.sparse]
    validations = [watch.validations[step] for step in sorted(watch.validations)]
    return Run(
        task.name, name, seed, validations, watch.shares, watch.masked, watch.taught, violations, ends(sparse), seconds
    )


def ends(layers: list[torch.nn.Module]) -> str:
    """Say what the weights of these layers are: ``"2:4"`` if half of every one is zero, or else ``"dense"``."""
    halves = [float((layer.get_parameter("weight") == 0).float().mean()) >= 0.5 for layer in layers]
    return "2:4" if all(halves) else "dense"
