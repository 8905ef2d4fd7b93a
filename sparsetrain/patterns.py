"""Patterns of a weight's mask, behind one interface: search codes, count violations, products that run sparse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.tile_codes.reference import count_bits, pack_codes, transpose_codes
from .masks import nm_mask, transposable_codes


@dataclass(frozen=True)
class Pattern:
    """A kind of mask.

    Args:
        name: The name users write.
        search: Scores ``[O, I]`` to int16 tile codes ``[O/4, I/4]``.
        along_rows: Two of every four are kept along ``in_features``.
        along_columns: Two of every four are kept along ``out_features``.
        sparse_products: How many of a layer's three GEMMs (forward, input gradient, weight gradient) can run sparse.
    """

    name: str
    search: Callable[[Tensor], Tensor]
    along_rows: bool
    along_columns: bool
    sparse_products: int

    def count_violations(self, codes: Tensor) -> Tensor:
        """Count the groups of four that do not keep exactly two; int64 scalar tensor."""
        count = codes.new_zeros((), dtype=torch.int64)
        if self.along_rows:
            count = count + _unbalanced_nibbles(codes)
        if self.along_columns:
            count = count + _unbalanced_nibbles(transpose_codes(codes))
        return count


def _unbalanced_nibbles(codes: Tensor) -> Tensor:
    bits = codes.to(torch.int32) & 0xFFFF
    bits = bits - (bits >> 1 & 0x5555)
    counts = (bits & 0x3333) + (bits >> 2 & 0x3333)  # four counts, 0 to 4, in four nibbles
    wrong = counts ^ 0x2222
    flags = (wrong | wrong >> 1 | wrong >> 2) & 0x1111
    return count_bits(flags.to(torch.int16)).sum()


def _search_row_wise(scores: Tensor) -> Tensor:
    return pack_codes(nm_mask(scores))


TRANSPOSABLE = Pattern("transposable", transposable_codes, along_rows=True, along_columns=True, sparse_products=2)
ROW_WISE = Pattern("row_wise", _search_row_wise, along_rows=True, along_columns=False, sparse_products=1)
PATTERNS = {pattern.name: pattern for pattern in (TRANSPOSABLE, ROW_WISE)}


def resolve_pattern(name: str) -> Pattern:
    """Return the pattern of that name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> resolve_pattern("transposable").sparse_products
        2
    """
    if name not in PATTERNS:
        raise ValueError(f"pattern is {name!r}: it must be one of {sorted(PATTERNS)}.")
    return PATTERNS[name]
