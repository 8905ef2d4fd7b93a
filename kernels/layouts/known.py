"""Known orders of metadata as tables: filled once a shape, so that a repack is one gather."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..metadata_order import cusparselt_sm80_place, cutlass_place
from .learning import LearnedLayout

Place = Callable[[Tensor, Tensor, int], Tensor]


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
    return _table(cutlass_place, rows, columns, device)


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
    return _table(cusparselt_sm80_place, rows, columns, device)


@functools.lru_cache(maxsize=64)
def _table(place: Place, rows: int, columns: int, device: torch.device) -> LearnedLayout:
    words = torch.arange(rows * columns // 16, dtype=torch.int32, device=device)
    places = place(words // (columns // 16), words % (columns // 16), rows)
    source = torch.empty_like(words).index_copy_(0, places.long(), words)
    return LearnedLayout(rows, columns, 16, source, torch.empty(0, dtype=torch.int16, device=device))
