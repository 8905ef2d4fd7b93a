"""Small models, and how tests train them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sparsetrain as st


def mlp(width: int = 16, hidden: int = 32, seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, hidden, bias), nn.Tanh(), nn.Linear(hidden, width, bias))


def convnet(channels: int = 4, hidden: int = 16, seed: int = 0) -> nn.Sequential:
    """Convolutions on 2×2 images that are made of 16 numbers, so that :func:`train` fits it as it fits :func:`mlp`."""
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(channels, hidden, 3, padding=1), nn.Tanh(), nn.Conv2d(hidden, channels, 1)
    return nn.Sequential(nn.Unflatten(1, (channels, 2, 2)), *convolutions, nn.Flatten())


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def sparse_run(
    method: Any = "fst", total: int | None = 12, seed: int = 0, **options: Any
) -> tuple[nn.Sequential, torch.optim.AdamW, st.SparseTraining]:
    model = mlp(seed=seed)
    optimizer = adamw(model)
    return model, optimizer, st.SparseTraining(model, optimizer, method, total, verbose=False, **options)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0, clip: float | None = None,
    distilled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> None:  # fmt: skip
    """Plain loop; the batch of a step depends on the step alone."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        x = x.to(next(model.parameters()))
        distilled((model(x) - x.flip(1)).square().mean()).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
