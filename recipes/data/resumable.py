"""``ResumableLoader``: batches that are a function of (seed, epoch, batch index), and a position that is saved."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochShuffle(DistributedSampler[int]):
    """Yields indices in an order drawn from (seed, epoch), from a position on.

    It is a ``DistributedSampler``, so Lightning tells it the epoch and leaves it in place on several processes.

    Args:
        count: Examples.
        batch_size: Examples of a batch; an incomplete last batch is dropped.
        seed: Any integer.
        rank: This process's share: every ``world``-th batch, so that ranks never see the same example.
        world: Number of processes.

    Raises:
        ValueError: If there is not one batch for every process.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or count < batch_size * world:
            raise ValueError(
                f"batch_size is {batch_size}: {count} examples on {world} process(es) allow 1 to {count // world}, "
                "so change batch_size or give more data."
            )
        super().__init__(range(count), world, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.count, self.batch_size = count, batch_size
        self.batches = count // batch_size // world
        self.taken = 0  # batches of this epoch that were handed out
        self.fresh = True  # the position is meant for the next iteration

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch))
        for batch in range(self.taken, self.batches):
            first = (batch * self.num_replicas + self.rank) * self.batch_size
            yield from order[first : first + self.batch_size].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; a position restored inside the same epoch is kept."""
        if not (self.fresh and epoch == self.epoch):
            self.move(epoch, 0)

    def move(self, epoch: int, taken: int) -> None:
        """Let the next iteration begin after ``taken`` batches of an epoch."""
        self.epoch, self.taken, self.fresh = epoch, taken, True


class ResumableLoader(DataLoader[Tensor]):
    """A training loader that Lightning saves in checkpoints: a resumed run sees the batches it had not seen.

    Every iteration is one epoch with its own order; without a trainer, each starts the epoch after the last one's.
    Batches count once they are handed out, so prefetching workers do not move the position. On several processes pass
    ``rank`` and ``world``: the loader shards itself, whatever ``use_distributed_sampler`` says. Lightning's
    ``overfit_batches`` needs a loader in sequential order instead.

    Args:
        dataset: Has ``__getitems__`` that returns a batch.
        batch_size: Examples of a batch on this process.
        seed: Of the order.
        rank: This process.
        world: Number of processes.
        num_workers: As in ``DataLoader``.

    Raises:
        ValueError: If there is not one batch for every process.

    Example:
        >>> from sparsetrain.recipes.data.documents import Blocks
        >>> blocks = Blocks(torch.arange(24, dtype=torch.uint8), 2)
        >>> loader, resumed = (ResumableLoader(blocks, 4, seed=0) for _ in range(2))
        >>> batches = iter(loader)
        >>> _ = next(batches)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> torch.equal(next(batches), next(iter(resumed)))
        True
    """

    def __init__(
        self, dataset: Dataset[Tensor], batch_size: int, seed: int, rank: int = 0, world: int = 1, num_workers: int = 0
    ) -> None:
        order = EpochShuffle(len(dataset), batch_size, seed, rank, world)  # type: ignore[arg-type]
        super().__init__(dataset, batch_size, sampler=order, drop_last=True, num_workers=num_workers, collate_fn=as_is)
        self.order = order

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator reads the position at its first batch: Lightning makes the iterator before it sets the epoch
        order = self.order
        if not order.fresh or order.taken >= order.batches:
            order.move(order.epoch + 1, 0)
        order.fresh = False
        for batch in super().__iter__():
            order.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the batches taken from it."""
        return {"epoch": self.order.epoch, "taken": self.order.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were taken."""
        self.order.move(state["epoch"], state["taken"])


def as_is(batch: Any) -> Any:
    """Return a batch that ``__getitems__`` made whole."""
    return batch
