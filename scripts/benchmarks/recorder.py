"""A callback that times training steps, and within them refreshing and repacking, without waiting for the device."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measure import recorded_event

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.training import SparseTraining

PARTS = {"refresh": "_refresh", "repack": "_repack"}
"""What is timed within steps, and the methods of ``SparseTraining`` that do it."""


class Recorder(Callback):
    """Marks the end of every step; comes after ``SparseTrainingCallback`` in the trainer's list.

    Args:
        warmup: Steps that do not count.
        device: ``"cuda"``, where marks are events, so that the host runs ahead as it does without them; or ``"cpu"``.
    """

    def __init__(self, warmup: int, device: str) -> None:
        self.warmup = warmup
        self.device = device
        self.products: Counter[str] = Counter()  # layers, by who computed their products
        self._marks: list[Any] = []
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put marks around what is timed within steps."""
        for training in _trainings(trainer):
            for part, method in PARTS.items():
                self._spans[part] = []
                setattr(training, method, self._marked(part, getattr(training, method)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of a step."""
        self._marks.append(self._mark())
        if len(self._marks) == self.warmup and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask who computed the products while the layers are sparse, and wait for the last step."""
        for training in _trainings(trainer):
            self.products.update(choice.products for choice in training.report.sparse)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self) -> list[float]:
        """Return the time of every step after the warm-up."""
        marks = self._marks[self.warmup - 1 :]
        return [self._between(start, end) for start, end in itertools.pairwise(marks)]

    def shares(self) -> dict[str, float]:
        """Return the share of these steps' time that each part took."""
        whole = sum(self.milliseconds())
        return {part: sum(self._between(*span) for span in spans) / whole for part, spans in self._spans.items()}

    def peak_megabytes(self) -> float | None:
        """Return the most memory (MiB) that was allocated in these steps; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else None

    def _marked(self, part: str, method: Callable[[], None]) -> Callable[[], None]:
        def marked() -> None:
            start = self._mark()
            method()
            if len(self._marks) >= self.warmup:
                self._spans[part].append((start, self._mark()))

        return marked

    def _mark(self) -> Any:
        return recorded_event() if self.device == "cuda" else time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) if self.device == "cuda" else 1e3 * (end - start))


def _trainings(trainer: Trainer) -> list[SparseTraining]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback.training for callback in callbacks if isinstance(callback, SparseTrainingCallback)]
    return [training for training in found if training is not None]
