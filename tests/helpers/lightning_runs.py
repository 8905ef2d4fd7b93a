"""A small Lightning module, and batches whose position is part of a checkpoint."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule
from models import mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


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
