"""``GPTModule``: language-model training of a :class:`GPT` in Lightning."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from ..muon import muon_with_adamw
from ..optimization import WarmupCosine, require_lr_cycle, weight_decay_groups, with_warmup_cosine
from .model import GPT, ActivationName

__all__ = ["GPTModule", "WarmupCosine"]

TOKEN_KEYS = ("tokens", "input_ids")


class GPTModule(LightningModule):
    """A GPT with AdamW or Muon and a learning rate that warms up and decays along a cosine.

    Args:
        vocabulary: Number of tokens.
        width: Size of the residual stream.
        depth: Number of blocks.
        heads: Attention heads of a block.
        context: Longest sequence.
        positions: ``"rope"`` or ``"learned"``.
        mlp: ``"swiglu"``, ``"geglu"``, ``"relu2"`` or ``"gelu"``.
        hidden: Size of the MLP's hidden layer; None chooses by the kind of MLP.
        tied: Share the head's weight with the token embedding.
        learning_rate: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of the peak.
        warmup_steps: Optimizer steps of linear warm-up.
        lr_cycle: Length of warm-up and decay as a fraction of the run; 0.5 for a schedule that restarts half-way.
        weight_decay: Of matrices; vectors have none.
        betas: Of AdamW.
        dropout: Share of attention weights and of each branch's output that is zeroed while training.
        fused_activation: Compute the MLP's activation by one kernel, see :class:`.GPT`.
        kv_heads: Heads of keys and values; None is one for every head.
        optimizer: ``"adamw"``, or ``"muon"`` for the matrices of the blocks beside AdamW for the rest.

    Raises:
        ValueError: If a value does not fit, or the learning rate is to decay over a run without an end.

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
        mlp: ActivationName = "swiglu",
        hidden: int | None = None,
        tied: bool = True,
        learning_rate: float = 2e-3,
        min_lr_ratio: float = 0.1,
        warmup_steps: int = 20,
        lr_cycle: float = 1.0,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        dropout: float = 0.0,
        fused_activation: bool = False,
        kv_heads: int | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer is {optimizer!r}: it must be 'adamw' or 'muon'.")
        require_lr_cycle(lr_cycle)
        self.model = GPT(
            vocabulary, width, depth, heads, context, positions, mlp, hidden, tied, dropout, fused_activation, kv_heads
        )

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
        """Return the optimizer and its per-step schedule."""
        options = self.hparams
        rate, decay, betas = options["learning_rate"], options["weight_decay"], tuple(options["betas"])
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "muon":
            optimizer = muon_with_adamw(self.model, rate, decay, betas)
        else:
            optimizer = torch.optim.AdamW(weight_decay_groups(self.parameters(), decay), lr=rate, betas=betas)
        total = self.trainer.estimated_stepping_batches
        return with_warmup_cosine(
            optimizer, total, options["warmup_steps"], options["min_lr_ratio"], options["lr_cycle"]
        )


def _tokens(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    for key in TOKEN_KEYS:
        if key in batch:
            return batch[key]
    raise ValueError(f"the batch has the keys {sorted(batch)}: its token ids must be under one of {TOKEN_KEYS}.")
