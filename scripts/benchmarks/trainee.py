"""A GPT that is trained step by step, dense or sparse, and the times of its steps."""

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.recipes.gpt.model import GPT
from sparsetrain.recipes.optimization import weight_decay_groups
from sparsetrain.training import SparseTraining

from . import float8
from .step_timer import StepTimer, synchronize

REFRESH_EVERY = 40
BATCHES = 8  # different ones, in turn
LEARNING_RATE, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Size:
    """A GPT with SwiGLU, and the sequences of a step; ``hidden`` is a multiple of 128."""

    width: int
    depth: int
    heads: int
    hidden: int
    vocabulary: int = 50304
    context: int = 1024
    batch: int = 16

    @property
    def weights(self) -> int:
        """Entries that products read for every token: those of the blocks, and the head's."""
        return self.depth * self.width * (4 * self.width + 3 * self.hidden) + self.width * self.vocabulary

    def flops(self, batch: int) -> float:
        """Return the operations of a step: six a weight and token, and attention below the diagonal alone."""
        tokens = batch * self.context
        return 6.0 * tokens * self.weights + 6.0 * tokens * self.context * self.width * self.depth


SIZES = {
    "124M": Size(768, 12, 12, 2048),
    "350M": Size(1024, 24, 16, 2816),
    "1.3B": Size(2048, 24, 16, 5632, batch=8),
    "tiny": Size(64, 2, 2, 128, vocabulary=256, context=32, batch=4),
}


@dataclass(frozen=True)
class Variant:
    """How a GPT is trained.

    Args:
        kind: ``"dense"``, ``"fp8 dense"`` or ``"sparse"``.
        backend: Of a sparse one's products.
        mvue: Weight gradients from 2:4 estimates.
        compiled: ``"model"``: all of it, head and cross-entropy too; ``"blocks"``; or ``"none"``.
    """

    kind: str
    backend: str = ""
    mvue: bool = False
    compiled: str = "model"

    @property
    def is_dense(self) -> bool:
        """Whether it has no masks."""
        return self.kind != "sparse"

    @property
    def name(self) -> str:
        """As in the table and the CSV."""
        words = [f"{self.kind} {self.backend}".strip(), "mvue" if self.mvue else ""]
        words.append("eager" if self.compiled == "none" else f"compiled {self.compiled}")
        return ", ".join(word for word in words if word)


class Loss(nn.Module):
    """Model and cross-entropy as one module, so that one graph can hold both."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of token ids ``[batch, context + 1]``."""
        return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Trainee:
    """A model, its optimizer and its batches.

    Args:
        size: Of the model.
        batch: Sequences of a step.
        variant: How it is trained.
        device: ``"cuda"`` or ``"cpu"``.
        steps: At most.
        optimizer: ``"fused"``: torch's AdamW; ``"sparse"``: sparse variants use ``sparsetrain.optim.SparseAdamW``.
    """

    def __init__(self, size: Size, batch: int, variant: Variant, device: str, steps: int, optimizer: str) -> None:
        torch.manual_seed(0)
        self.variant, self.device = variant, device
        self.milliseconds: list[float] = []
        model = GPT(size.vocabulary, size.width, size.depth, size.heads, size.context, hidden=size.hidden).to(device)
        blocks: list[nn.Module] = list(model.blocks)
        if variant.kind == "fp8 dense":
            float8.convert_(model.blocks)
        groups = weight_decay_groups(model.parameters(), WEIGHT_DECAY)
        make = sparse_adamw if optimizer == "sparse" and not variant.is_dense else fused_adamw
        self.optimizer = make(groups)
        self.training: SparseTraining | None = None
        self.clock = StepTimer(device)
        if not variant.is_dense:
            # without the preset's dense tail: every timed step is sparse
            method = {"preset": "fst", "refresh_every": REFRESH_EVERY, "dense_tail": 0, "mvue": variant.mvue}
            self.training = SparseTraining(
                model, self.optimizer, method, total_steps=steps, backend=variant.backend, verbose=False
            )
            self.clock.watch(self.training)
        self.loss = Loss(model)
        for part in {"none": [], "model": [self.loss], "blocks": blocks}[variant.compiled]:
            part.compile()
        shape = (BATCHES, batch, size.context + 1)
        self.batches = itertools.cycle(torch.randint(size.vocabulary, shape, device=device))
        self.last_loss = torch.zeros(())

    def step(self) -> None:
        """Train on the next batch; never waits for the device."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.loss(next(self.batches))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_loss = loss.detach()

    def round(self, steps: int) -> list[float]:
        """Train ``1 + steps`` times, and return the milliseconds of every step but the first."""
        synchronize(self.device)
        self.step()
        with self.clock:
            for _ in range(steps):
                self.step()
                self.clock.mark()
        found = self.clock.steps()
        self.milliseconds += found
        return found

    def products(self) -> dict[str, int]:
        """Return the number of sparse layers, by the backend of their products."""
        return dict(Counter(choice.products for choice in self.training.report.sparse)) if self.training else {}


def fused_adamw(groups: list[dict[str, Any]]) -> Optimizer:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def sparse_adamw(groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer that updates, decays and packs in one pass.

    Raises:
        ImportError: If this version has none.
    """
    import importlib

    made: Optimizer = importlib.import_module("sparsetrain.optim").SparseAdamW(groups, lr=LEARNING_RATE, betas=BETAS)
    return made
