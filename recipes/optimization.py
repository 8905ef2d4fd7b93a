"""What the recipes' modules share: parameter groups, and a learning rate that warms up and decays along a cosine."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def weight_decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's two groups: matrices and kernels, which decay, and vectors, which do not.

    Args:
        parameters: Of a module, in its order.
        weight_decay: Of parameters with at least two dimensions.

    Example:
        >>> [len(group["params"]) for group in weight_decay_groups(nn.Linear(4, 2).parameters(), 0.1)]
        [1, 1]
    """
    parameters = list(parameters)
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]


def with_warmup_cosine(
    optimizer: Optimizer, total: float, warmup_steps: int, min_lr_ratio: float, lr_cycle: float
) -> dict[str, Any]:
    """Return an optimizer and its per-step :class:`WarmupCosine`, as ``configure_optimizers`` returns them.

    Args:
        optimizer: At its peak learning rate.
        total: Optimizer steps of the run, such as ``trainer.estimated_stepping_batches``.
        warmup_steps: Optimizer steps of linear warm-up.
        min_lr_ratio: Final learning rate as a fraction of the peak.
        lr_cycle: Length of warm-up and decay as a fraction of the run.

    Raises:
        ValueError: If the run has no end.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> with_warmup_cosine(optimizer, 10, 4, 0.1, 1.0)["lr_scheduler"]["scheduler"].get_last_lr()
        [0.25]
    """
    if math.isinf(total):
        raise ValueError(
            "the trainer has no end (max_steps and max_epochs are -1): the learning rate decays over the length of "
            "the run, so set one of them."
        )
    factor = WarmupCosine(warmup_steps, max(1, round(lr_cycle * total)), min_lr_ratio)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def require_lr_cycle(lr_cycle: float) -> None:
    """Check a cycle's length.

    Raises:
        ValueError: If it is no fraction of a run.

    Example:
        >>> require_lr_cycle(0.5)
    """
    if not 0 < lr_cycle <= 1:
        raise ValueError(f"lr_cycle is {lr_cycle}: it must be above 0 and at most 1 (fraction of the run).")


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
