"""Oracles and small models shared by the tests; an expectation is computed by kernels' references or by loops alone."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparsetrain.kernels.mask_search.reference import search_row_wise, search_transposable
from sparsetrain.kernels.tile_codes.reference import unpack_codes


def brute_force_mask(scores: np.ndarray) -> np.ndarray:
    """Best 2:4 mask of a float64 matrix over the 90 patterns of every tile."""
    return unpack_codes(search_transposable(torch.from_numpy(scores))).numpy()


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest magnitudes of every four in a row."""
    return search_row_wise(weight.abs(), 2, 4)


def two_of_those(weight: Tensor, mask: Tensor) -> Tensor:
    """Of every four in a column, the two largest magnitudes that a mask keeps, by loops."""
    kept = torch.zeros_like(mask)
    for column in range(weight.shape[1]):
        entries, allowed = weight[:, column].abs().tolist(), mask[:, column].tolist()
        for top in range(0, weight.shape[0], 4):
            places = sorted((row for row in range(top, top + 4) if allowed[row]), key=lambda row: -entries[row])
            kept[places[:2], column] = True
    return kept


def mlp(width: int = 16, hidden: int = 32, seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, hidden, bias), nn.Tanh(), nn.Linear(hidden, width, bias))


def convnet(channels: int = 4, hidden: int = 16, seed: int = 0) -> nn.Sequential:
    """Convolutions on 2×2 images that are made of 16 numbers, so that :func:`train` fits it as it fits :func:`mlp`."""
    torch.manual_seed(seed)
    convolutions = nn.Conv2d(channels, hidden, 3, padding=1), nn.Tanh(), nn.Conv2d(hidden, channels, 1)
    return nn.Sequential(nn.Unflatten(1, (channels, 2, 2)), *convolutions, nn.Flatten())


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


class Regression(LightningModule):
    """A small Lightning module with an unordered data set: batches depend on their index alone."""

    def __init__(self, width: int = 16, hidden: int = 32, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = mlp(width, hidden)
        self.extra = nn.Linear(width, 3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        loss: Tensor = (self.net(x) - x.flip(1)).square().mean() + self.extra(x).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (x,) = batch
        self.log("val/loss", (self.net(x) - x.flip(1)).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class ResumableBatches(DataLoader[tuple[Tensor, ...]]):
    """Batches in order; its position is part of Lightning's checkpoints."""

    taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.taken
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.taken = (index + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def batches(count: int = 64, batch_size: int = 4) -> ResumableBatches:
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(0))
    return ResumableBatches(TensorDataset(x), batch_size)
