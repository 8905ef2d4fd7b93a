"""One run: a small GPT on text, by one method with one seed."""

import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import resolve_method
from sparsetrain.recipes.data import TextDataModule
from sparsetrain.recipes.gpt import GPTModule
from sparsetrain.recipes.history import History


@dataclass(frozen=True)
class Size:
    """A model and its data."""

    width: int
    depth: int
    heads: int
    context: int
    batch: int
    max_bytes: int
    validation_blocks: int = 256


SIZES = {
    "tiny": Size(32, 2, 2, 32, 4, 300_000, 16),
    "small": Size(128, 4, 4, 128, 16, 8_000_000),
    "124M": Size(768, 12, 12, 1024, 32, 0),
}
"""tiny is for tests; 124M for a GPU, on all there is to read."""


@dataclass
class Run:
    """What a run is compared by.

    Args:
        losses: Step to validation loss.
        shares: Of the linear layers' GEMM FLOPs that could run sparse, in each step.
        violations: At the end; must be 0.
        ends: ``"2:4"`` or ``"dense"``.
        seconds: Of training, validation included.
    """

    method: str
    seed: int
    losses: dict[int, float]
    shares: list[float]
    violations: int
    ends: str
    seconds: float

    @property
    def final(self) -> float:
        """The last validation loss."""
        return self.losses[max(self.losses)]


class Shares(Callback):
    """Collects the share of sparse FLOPs of every step."""

    def __init__(self, callback: SparseTrainingCallback) -> None:
        self.values: list[float] = []
        self._callback = callback

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Ask while the step's phase is in force."""
        assert self._callback.training is not None
        self.values.append(self._callback.training.sparse_flops_share)


def train(name: str, method: dict[str, Any], seed: int, steps: int, size: Size) -> Run:
    """Train one model; the same seed gives every method the same weights and the same batches."""
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    data = TextDataModule(
        context=size.context, batch_size=size.batch, validation_blocks=size.validation_blocks,
        max_bytes=size.max_bytes or None, seed=seed,
    )  # fmt: skip
    model = GPTModule(width=size.width, depth=size.depth, heads=size.heads, context=size.context)
    callback = SparseTrainingCallback(resolve_method(method), targets="mlp")
    history, shares = History(), Shares(callback)
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, devices=1, logger=False, callbacks=[callback, history, shares],
        gradient_clip_val=1.0, val_check_interval=max(1, steps // 10), check_val_every_n_epoch=None,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    (final,) = trainer.validate(model, data, verbose=False)
    losses = {entry.step: entry.loss for entry in history.validations}
    losses[steps] = float(final["val/loss"])
    training = callback.training
    assert training is not None
    metrics = training.metrics()
    ends = "dense" if metrics["sparse_layers"] == 0 else "2:4"
    return Run(name, seed, losses, shares.values, int(metrics["violations"]), ends, seconds)
