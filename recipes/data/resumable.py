"""``ResumableLoader``: batches whose order is a function of (seed, epoch), and a position that is saved."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset


class EpochShuffle(BatchSampler):
    """Yields batches of indices in an order drawn from (seed, epoch); starts where it is told.

    Args:
        count: Examples.
        batch_size: Examples of a batch; an incomplete last batch is dropped.
        seed: Any integer.
        rank: This process's share: every ``world``-th batch, so that ranks never see the same example.
        world: Number of processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count // self.batch_size // self.world

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch))
        for batch in range(self.start, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class ResumableLoader(DataLoader[Tensor]):
    """A training loader that Lightning saves in checkpoints: a resumed run sees the batches it had not seen.

    Args:
        dataset: Has ``__getitems__`` that returns a batch.
        batch_size: Examples of a batch on this process.
        seed: Of the order.
        rank: This process.
        world: Number of processes.
        num_workers: As in ``DataLoader``.
    """

    def __init__(
        self, dataset: Dataset[Tensor], batch_size: int, seed: int, rank: int = 0, world: int = 1, num_workers: int = 0
    ) -> None:
        order = EpochShuffle(len(dataset), batch_size, seed, rank, world)  # type: ignore[arg-type]
        super().__init__(dataset, batch_sampler=order, num_workers=num_workers, collate_fn=_as_is)
        self.order = order
        self.epoch = self.taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.order.epoch, self.order.start = self.epoch, self.taken
        for batch in super().__iter__():
            self.taken += 1
            if self.taken == len(self):
                self.epoch, self.taken = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the batches taken from it."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches that were taken."""
        self.epoch, self.taken = state["epoch"], state["taken"]


def _as_is(batch: Any) -> Any:
    return batch
