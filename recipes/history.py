"""``History``: what a run's report and plot need, collected while it trains."""

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from sparsetrain.callbacks import SparseTrainingCallback


@dataclass(frozen=True)
class Validation:
    """A validation: after which step, in which phase, and the loss."""

    step: int
    phase: str
    loss: float


@dataclass(frozen=True)
class Refresh:
    """A mask search: after which step, in which phase, and its metrics."""

    step: int
    phase: str
    metrics: dict[str, float] = field(default_factory=dict)


class History(Callback):
    """Collects validations and mask searches; put it after ``SparseTrainingCallback``.

    Args:
        loss: The metric to collect at validations.
    """

    def __init__(self, loss: str = "val/loss") -> None:
        self.loss = loss
        self.validations: list[Validation] = []
        self.refreshes: list[Refresh] = []
        self._clock = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the metrics of a mask search."""
        training = _engine(trainer)
        if training is not None and training.refreshed and training.clock != self._clock:
            self._clock = training.clock
            self.refreshes.append(Refresh(training.clock, training.phase, training.metrics()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collect the loss of a validation, the one before the first step included."""
        training = _engine(trainer)
        phase = "dense" if training is None or training.finished else training.phase
        loss = float(trainer.callback_metrics.get(self.loss, float("nan")))
        self.validations.append(Validation(trainer.global_step, phase, loss))

    def last_in_force(self) -> Refresh | None:
        """Return the last mask search whose masks were applied."""
        return next((refresh for refresh in reversed(self.refreshes) if refresh.phase != "dense"), None)


def _engine(trainer: Trainer) -> Any:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SparseTrainingCallback):
            return callback.training
    return None
