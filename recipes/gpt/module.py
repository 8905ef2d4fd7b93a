"""``GPTModule``: language-model training of a :class:`GPT` in Lightning."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from .model import GPT

TOKEN_KEYS = ("tokens", "input_ids")


class GPTModule(LightningModule):
    """A GPT with AdamW and a learning rate that warms up and decays along a cosine.

    Args:
        vocabulary: Number of tokens.
        width: Size of the residual stream.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context: Longest sequence.
        positions: ``"rope"`` or ``"learned"``.
        mlp: ``"swiglu"`` or ``"gelu"``.
        hidden: Size of the MLP's hidden layer; None chooses by the kind of MLP.
        tied: Share the head's weight with the token embedding.
        learning_rate: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of the peak.
        warmup_steps: Optimizer steps of linear warm-up.
        lr_cycle: Length of warm-up and decay as a fraction of the run; 0.5 for a schedule that restarts half-way.
        weight_decay: Of matrices; vectors have none.
        betas: Of AdamW.
        dropout: Share of attention weights and of each branch's output that is zeroed while training.

    Raises:
        ValueError: If a size does not fit, or the learning rate is to decay over a run without an end.

    Example:
        >>> GPTModule(width=32, depth=1, heads=2, context=8).loss(torch.zeros(2, 9, dtype=torch.long)).dim()
        0
    """

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        context: int = 128,
        positions: Literal["rope", "learned"] = "rope",
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        hidden: int | None = None,
        tied: bool = True,
        learning_rate: float = 2e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 20,
        lr_cycle: float = 1.0,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 0 < lr_cycle <= 1:
            raise ValueError(f"lr_cycle is {lr_cycle}: it must be above 0 and at most 1 (fraction of the run).")
        self.model = GPT(vocabulary, width, depth, heads, context, positions, mlp, hidden, tied, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[batch, time, vocabulary]`` for token ids ``[batch, time]``."""
        logits: Tensor = self.model(tokens)
        return logits

    def loss(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss in nats per token for token ids ``[batch, time + 1]``, alone or in a mapping."""
        blocks = _tokens(batch).long()
        return F.cross_entropy(self(blocks[:, :-1]).flatten(0, 1), blocks[:, 1:].flatten())

    def training_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of token ids ``[batch, time + 1]``."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(_tokens(batch)))
        return loss

    def validation_step(self, batch: Tensor | Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss of a batch of token ids ``[batch, time + 1]``."""
        self.log("val/loss", self.loss(batch), prog_bar=True, batch_size=len(_tokens(batch)), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return AdamW and its per-step schedule."""
        matrices = [parameter for parameter in self.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.hparams["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], betas=tuple(self.hparams["betas"]))
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ValueError(
                "the trainer has no end (max_steps and max_epochs are -1): the learning rate decays over the length of "
                "the run, so set one of them."
            )
        steps = max(1, round(self.hparams["lr_cycle"] * total))
        factor = WarmupCosine(self.hparams["warmup_steps"], steps, self.hparams["min_lr_ratio"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _tokens(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    for key in TOKEN_KEYS:
        if key in batch:
            return batch[key]
    raise ValueError(f"the batch has the keys {sorted(batch)}: its token ids must be under one of {TOKEN_KEYS}.")


class WarmupCosine:
    """Factor of the learning rate: linear warm-up, cosine decay, then constant.

    Args:
        warmup: Steps of warm-up.
        steps: Steps of warm-up and decay.
        floor: Final factor.

    Example:
        >>> factor = WarmupCosine(2, 10, 0.1)
        >>> [round(factor(step), 2) for step in (0, 1, 2, 10, 99)]
        [0.5, 1.0, 1.0, 0.1, 0.1]
    """

    def __init__(self, warmup: int, steps: int, floor: float) -> None:
        self.warmup = min(warmup, steps)
        self.steps = steps
        self.floor = floor

    def __call__(self, step: int) -> float:
        """Return the factor of a 0-based step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
