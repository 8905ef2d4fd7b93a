"""Exact transposable 1:4 and 3:4 search on a CPU: a tile keeps, or prunes, one of the 24 permutations."""

import itertools

import torch
from torch import Tensor

from .cpu import ranking_keys

PERMUTATIONS = tuple(itertools.permutations(range(4)))
"""Column of each row, in lexicographic order; ties go to the first."""

_CODES = tuple(sum(1 << 4 * row + column for row, column in enumerate(columns)) for columns in PERMUTATIONS)


@torch.no_grad()
def search_permutations(scores: Tensor, n: int) -> Tensor:
    """Return the tile codes of the best transposable 1:4 or 3:4 mask: the optimum over 24 patterns of every tile.

    Args:
        scores: ``[O, I]``, any floating dtype; O and I multiples of 4. Larger is kept; signs count.
        n: Entries kept of every row and column of a tile: 1 or 3.

    Returns:
        int16 ``[O/4, I/4]``; bit ``4*row + col`` is set where the entry is kept.

    Example:
        >>> hex(search_permutations(torch.eye(4), n=1).item() & 0xFFFF)
        '0x8421'
        >>> hex(search_permutations(-torch.eye(4), n=3).item() & 0xFFFF)
        '0x7bde'

    Source: with one of four, or one of four missing, in every row and column, a mask is a permutation matrix or its
    complement.
    """
    rows, columns = scores.shape[0] // 4, scores.shape[1] // 4
    keys = ranking_keys(scores).view(rows, 4, columns, 4)  # O/4, row, I/4, column
    if n == 3:
        keys = -keys  # what is pruned loses least
    best = torch.full((rows, columns), float("-inf"), dtype=keys.dtype, device=keys.device)
    codes = torch.zeros((rows, columns), dtype=torch.int32, device=keys.device)
    for code, choice in zip(_CODES, PERMUTATIONS, strict=True):
        total = sum(keys[:, row, :, column] for row, column in enumerate(choice))
        assert isinstance(total, Tensor)
        better = total > best
        best = torch.where(better, total, best)
        codes = codes.masked_fill(better, code)
    return (codes if n == 1 else codes ^ 0xFFFF).to(torch.int16)
