"""The searches by definition: every pattern of a tile and a maximum, and a stable sort of every group."""

import functools
import itertools

import torch
from torch import Tensor

from ..tile_codes.reference import pack_codes

NONFINITE_KEY = 2.0**100
"""Scores are clamped to ±2^100, so that sums of keys never overflow; NaN ranks as +2^100."""

PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
"""The three ways to split four rows into two pairs, in the order of preference; the first row of a pair leads it."""

LINES = {
    1: ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)),
    2: ((1, 1, 0, 0), (0, 0, 1, 1), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1)),
    3: ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)),
}
"""What a row of a tile may keep, by how many entries it keeps, in the order of preference."""

Grid = tuple[tuple[int, ...], ...]


def ranking_keys(scores: Tensor) -> Tensor:
    """Clamp scores to the finite keys that the searches rank, in float32 (float64 stays float64).

    Args:
        scores: Any shape, any floating dtype.

    Returns:
        A new contiguous tensor of the same shape: values in [-2^100, 2^100], NaN replaced by 2^100, -0 by +0.

    Example:
        >>> ranking_keys(torch.tensor([1.0, float("inf"), float("nan")])).tolist()[0]
        1.0
    """
    wide = scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return wide.contiguous().clamp(-NONFINITE_KEY, NONFINITE_KEY).nan_to_num(nan=NONFINITE_KEY) + 0.0


@functools.cache
def patterns(n: int) -> Tensor:
    """Return the transposable patterns of a tile in the order in which ties prefer them, bool ``[patterns, 4, 4]``.

    Args:
        n: Entries kept of every row and column: 1 or 3 have 24 patterns, 2 has 90.

    Example:
        >>> [len(patterns(n)) for n in (1, 2, 3)]
        [24, 90, 24]
    """
    grids = [
        grid
        for grid in itertools.product(LINES[n], repeat=4)
        if all(sum(column) == n for column in zip(*grid, strict=True))
    ]
    return torch.tensor(sorted(grids, key=_preference) if n == 2 else grids, dtype=torch.bool)


def _preference(grid: Grid) -> tuple[int, ...]:
    """Rank a 2:4 pattern: its first pairing of complementary rows, then what their leaders keep."""
    for rank, pairs in enumerate(PAIRINGS):
        if all(set(zip(grid[leader], grid[partner], strict=True)) == {(0, 1), (1, 0)} for leader, partner in pairs):
            return rank, *(LINES[2].index(grid[leader]) for leader, _ in pairs)
    raise AssertionError(f"no pairing splits {grid} into complementary rows.")


@torch.no_grad()
def search_transposable(scores: Tensor, magnitude: bool = False, n: int = 2) -> Tensor:
    """Return the tile codes of the best transposable n:4 mask: the first of :func:`patterns` with the largest sum.

    Sums are float64. Other implementations sum differences in the scores' precision: their codes are these where that
    is exact, and elsewhere codes of masks that keep as much but for rounding.

    Args:
        scores: ``[O, I]``, any floating dtype and strides; O and I multiples of 4. Larger is kept; signs count.
        magnitude: Rank by ``|score|``.
        n: Entries kept of every row and column of a tile: 1, 2 or 3.

    Returns:
        int16 ``[O/4, I/4]``; bit ``4*row + col`` is set where the entry is kept.

    Example:
        >>> tile = torch.tensor([[9.0, 8, 0, 0], [9, 8, 0, 0], [0, 0, 9, 8], [0, 0, 9, 8]])
        >>> hex(search_transposable(tile).item() & 0xFFFF)
        '0xcc33'
    """
    rows, columns = scores.shape
    keys = ranking_keys(scores.abs() if magnitude else scores).double()
    tiles = keys.view(rows // 4, 4, columns // 4, 4).transpose(1, 2).flatten(2)  # [O/4, I/4, 16]
    choices = patterns(n).to(scores.device)
    sums = tiles @ choices.flatten(1).double().t()  # [O/4, I/4, patterns]
    return pack_codes(choices).flatten()[sums.argmax(dim=2)]


@torch.no_grad()
def search_row_wise(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the n largest of every m consecutive entries of the last dimension; ties keep the earlier.

    Args:
        scores: ``[..., I]``, any floating dtype; I a multiple of m.
        n: Entries to keep of each group, 0 to m.
        m: Size of a group.

    Returns:
        bool, same shape as ``scores``.

    Example:
        >>> search_row_wise(torch.tensor([3.0, 1, 2, 2]), 2, 4).tolist()
        [True, False, True, False]
    """
    keys = ranking_keys(scores).view(-1, m)
    best = keys.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)
