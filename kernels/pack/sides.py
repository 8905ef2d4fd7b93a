"""Sides: where packed rows of several matrices go, of W or of Wᵀ, and in which order their metadata lie."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Side:
    """Targets of several matrices ``[R, C]``, one entry of each list for each.

    Args:
        values: ``[R, C/2]``, contiguous.
        meta: int16, contiguous: ``[R, ceil(C/16)]`` in natural order, else what the order needs.
        orders: Of the metadata: numbers of :class:`..metadata_order.Order`.
        tables: int32 ``[R·ceil(C/16)]``, the place of every word where the order is ``Order.TABLE``; else anything.

    Example:
        >>> import torch
        >>> values, meta = torch.zeros(4, 8), torch.zeros(4, 1, dtype=torch.int16)
        >>> Side([values], [meta], [0], [meta]).of([0]).orders
        [0]
    """

    values: Sequence[Tensor]
    meta: Sequence[Tensor]
    orders: Sequence[int]
    tables: Sequence[Tensor]

    def of(self, positions: Sequence[int]) -> "Side":
        """Return the targets at some positions."""
        values, meta, tables = ([column[i] for i in positions] for column in self.columns)
        return Side(values, meta, [self.orders[i] for i in positions], tables)

    @property
    def columns(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The lists of tensors."""
        return self.values, self.meta, self.tables


def known_sides(
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    orders: Sequence[int] | None,
) -> tuple[Side | None, Side | None]:
    """Return targets without tables that were checked before as sides.

    Example:
        >>> known_sides([], [], [], [], None)
        (None, None)
    """
    numbers = [0] * (len(meta) + len(meta_t)) if orders is None else orders
    side = Side(values, meta, numbers[: len(meta)], meta) if values else None
    return side, Side(values_t, meta_t, numbers[len(meta) :], meta_t) if values_t else None
