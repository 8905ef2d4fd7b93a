"""What dense runs are given that a method has too, so that a gain of masks is told from a gain of that."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.modifiers.frozen_moments import FrozenMoments

CONTROLS = ("moments_frozen_at", "dense_lr_factor")
"""Keys of a row's entry that are no part of its method."""


class MomentFreezer(Callback):
    """Freezes the second moments of all parameters after so many steps, whatever the masks do."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Freeze once."""
        if trainer.global_step == self._step:
            FrozenMoments(trainer.optimizers).freeze()


class DenseFactor(Callback):
    """Multiplies the learning rate of the layers that others make sparse, as ``lr_factor`` does, while all is dense.

    Args:
        callback: Of the run.
        factor: By which.
        start: Steps before it does.
    """

    def __init__(self, callback: SparseTrainingCallback, factor: float, start: int) -> None:
        self._callback, self._factor, self._start = callback, factor, start
        self._before: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Remember the weights."""
        self._before = [weight.clone() for weight in self._weights()]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        """Lengthen what the step has changed."""
        if trainer.global_step <= self._start:
            return
        for weight, before in zip(self._weights(), self._before, strict=True):
            weight.lerp_(before, 1 - self._factor)

    def _weights(self) -> Iterator[Tensor]:
        training = self._callback.training
        assert training is not None
        return (layer.master.detach() for layer in training.masks.layers.values())


def controls_of(entry: Mapping[str, Any], callback: SparseTrainingCallback, steps: int) -> list[Callback]:
    """Return what does to a run what its entry says beside the method.

    Args:
        entry: Of a row.
        callback: Of the run.
        steps: Of the run.
    """
    found: list[Callback] = []
    if "moments_frozen_at" in entry:
        found.append(MomentFreezer(round(entry["moments_frozen_at"] * steps)))
    if "dense_lr_factor" in entry:
        found.append(DenseFactor(callback, entry["dense_lr_factor"], round(0.2 * steps)))  # the head of recommended
    return found
