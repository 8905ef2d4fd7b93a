"""Sides to pack, in poisoned memory and any order of metadata, and what has to be there afterwards."""

import torch
from metadata_walks import WALKS
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.metadata_order import Order, metadata_words
from sparsetrain.kernels.pack import Side

POISON = -1


def laid_out(natural: Tensor, order: Order, table: Tensor | None) -> Tensor:
    """Natural words where an order has them, poison between them."""
    rows, words = natural.shape
    if table is not None:
        target = torch.full((int(table.max()) + 1,), POISON, dtype=torch.int16)
        for number, place in enumerate(table.tolist()):
            target[place] = natural.flatten()[number]
        return target
    walk = list(WALKS[order](rows, words))
    return torch.tensor(
        [int(natural[row, word]) if row < rows and word < words else POISON for row, word in walk], dtype=torch.int16
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Bit equality, but for what a NaN carries."""
    nan, integer = other.isnan(), {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.isnan(), nan) and torch.equal(one.view(integer)[~nan], other.view(integer)[~nan])


class Matrix:
    """A side of a weight to pack: targets in poisoned memory, and what has to be there afterwards."""

    def __init__(
        self, margins: Margins, rows: int, columns: int, order: Order, seed: int, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        words = -(-columns // 16)
        self.order, self.table = order, None
        if order == Order.TABLE:  # twice as many places as words
            self.table = torch.randperm(2 * rows * words, generator=torch.Generator().manual_seed(seed))
            self.table = self.table[: rows * words].int()
        size = int(self.table.max()) + 1 if self.table is not None else metadata_words(rows, columns, order)
        shape = (rows, words) if order == Order.NATURAL else (size,)
        self.values = margins.empty(rows, columns // 2, dtype=dtype)
        self.meta = margins.empty(*shape, dtype=torch.int16)
        self.places = self.meta if self.table is None else margins.of(self.table)

    def check(self, values: Tensor, natural: Tensor) -> None:
        assert same(self.values.cpu(), values)
        assert torch.equal(self.meta.cpu().flatten(), laid_out(natural, self.order, self.table))


def side(matrices: list[Matrix]) -> Side:
    return Side(
        [matrix.values for matrix in matrices], [matrix.meta for matrix in matrices],
        [matrix.order for matrix in matrices], [matrix.places for matrix in matrices],
    )  # fmt: skip


def columns(*sides: list[Matrix]) -> tuple[list[list[Tensor]], list[Tensor], list[int]]:
    """What operators take of the matrices of W and of Wᵀ: values and metadata of both, tables, orders."""
    lists = [[getattr(each, name) for each in matrices] for matrices in sides for name in ("values", "meta")]
    every = [each for matrices in sides for each in matrices]
    return lists, [each.places for each in every if each.table is not None], [int(each.order) for each in every]
