"""Known orders of metadata as tables: filled once a shape, so that a repack is one gather."""

import functools

import torch

from ..metadata_order import Order, metadata_places, metadata_words
from .learned_layout import LearnedLayout


def cutlass_layout(rows: int, columns: int, device: torch.device) -> LearnedLayout:
    """Return the order that CUTLASS reads on compute capability 8.x, for 16-bit values.

    Args:
        rows: R of the matrix ``[R, C]``, a multiple of 32.
        columns: C, a multiple of 32.
        device: Of the table.

    Example:
        >>> cutlass_layout(32, 32, torch.device("cpu")).source[:4].tolist()  # words of two rows, 8 apart
        [0, 16, 1, 17]
    """
    return known_layout(Order.CUTLASS, rows, columns, device)


def cusparselt_sm80_layout(rows: int, columns: int, device: torch.device) -> LearnedLayout:
    """Return the order that cuSPARSELt is believed to read on compute capability 8.x, for 16-bit values.

    Args:
        rows: R of the matrix ``[R, C]``, a multiple of 128.
        columns: C, a multiple of 128.
        device: Of the table.

    Example:
        >>> cusparselt_sm80_layout(128, 128, torch.device("cpu")).source.numel()
        1024
    """
    return known_layout(Order.CUSPARSELT_SM80, rows, columns, device)


@functools.lru_cache(maxsize=64)
def known_layout(order: Order, rows: int, columns: int, device: torch.device) -> LearnedLayout:
    """Return an order that is no table as one, with zeros for padding.

    Args:
        order: Which the sizes have, see :func:`..metadata_order.metadata_words`.
        rows: R of the matrix ``[R, C]``.
        columns: C, a multiple of 16.
        device: Of the table.

    Example:
        >>> known_layout(Order.CUTLASS_SM90_1, 16, 32, torch.device("cpu")).source[:4].tolist()  # rows 0 and 8
        [0, 16, 2, 18]
    """
    places = metadata_places(rows, columns, order, device).flatten()
    size = metadata_words(rows, columns, order)
    source = torch.full((size,), -1, dtype=torch.int32, device=device)
    source.index_copy_(0, places, torch.arange(places.numel(), dtype=torch.int32, device=device))
    padding = torch.zeros(size - places.numel(), dtype=torch.int16, device=device)
    return LearnedLayout(rows, columns, 16, source, padding)
