"""Patterns of a weight's mask, behind one interface: search codes, count violations, products that run sparse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks.rules import one_of, require
from ..kernels.tile_codes import count_bits, pack_codes, transpose_codes, unpack_codes
from .search import nm_mask, transposable_codes


@dataclass(frozen=True)
class Pattern:
    """A kind of mask.

    Args:
        name: The name users write.
        search: Scores ``[O, I]`` and the number of entries kept of every four (2 or 3) to int16 tile codes
            ``[O/4, I/4]``.
        along_rows: The mask is n:4 along ``in_features``.
        along_columns: The mask is n:4 along ``out_features``.
        sparse_products: How many of a layer's three GEMMs (forward, input gradient, weight gradient) can run sparse.
        search_backward: Weight ``[O, I]`` and its codes to codes that keep two of every four along ``out_features``;
            the input gradient's product sees what both keep. None if it sees what the forward sees.
    """

    name: str
    search: Callable[[Tensor, int], Tensor]
    along_rows: bool
    along_columns: bool
    sparse_products: int
    search_backward: Callable[[Tensor, Tensor], Tensor] | None = None

    def count_violations(self, codes: Tensor, kept: int = 2) -> Tensor:
        """Count the groups of four that do not keep exactly ``kept``; int64 scalar tensor."""
        count = codes.new_zeros((), dtype=torch.int64)
        if self.along_rows:
            count = count + _unbalanced_nibbles(codes, kept)
        if self.along_columns:
            count = count + _unbalanced_nibbles(transpose_codes(codes), kept)
        return count

    def count_backward_violations(self, codes: Tensor) -> Tensor:
        """Count the groups of four along ``out_features`` in which ``search_backward``'s codes do not keep two."""
        return _unbalanced_nibbles(transpose_codes(codes), 2)


def _unbalanced_nibbles(codes: Tensor, kept: int) -> Tensor:
    bits = codes.to(torch.int32) & 0xFFFF
    bits = bits - (bits >> 1 & 0x5555)
    counts = (bits & 0x3333) + (bits >> 2 & 0x3333)  # four counts, 0 to 4, in four nibbles
    wrong = counts ^ kept * 0x1111
    flags = (wrong | wrong >> 1 | wrong >> 2) & 0x1111
    return count_bits(flags.to(torch.int16)).sum()


def _search_row_wise(scores: Tensor, kept: int = 2) -> Tensor:
    return pack_codes(nm_mask(scores, kept))


def prune_again(weight: Tensor, codes: Tensor) -> Tensor:
    """Return codes that keep two of every four along ``out_features``, first of all what a mask keeps.

    Args:
        weight: ``[O, I]``.
        codes: int16 ``[O/4, I/4]`` of the mask.

    Returns:
        int16 ``[O/4, I/4]``; where the mask keeps fewer than two, some of what it prunes fills the places.

    Example:
        >>> weight, codes = torch.ones(4, 4), torch.full((1, 1), 0x3333, dtype=torch.int16)  # keeps two columns
        >>> again = prune_again(weight, codes)
        >>> int(count_bits(again).sum()), int(count_bits(again & codes).sum())
        (8, 4)

    Source: the double-pruned backward of Mozaffari et al., "SLoPe", ICLR 2025, arXiv 2405.16325.
    """
    kept = unpack_codes(codes)
    # what the mask prunes ranks behind zeros that it keeps
    return pack_codes(nm_mask(weight.detach().abs().masked_fill(~kept, -1.0), dim=0))


TRANSPOSABLE = Pattern("transposable", transposable_codes, along_rows=True, along_columns=True, sparse_products=2)
ROW_WISE = Pattern("row_wise", _search_row_wise, along_rows=True, along_columns=False, sparse_products=1)
DOUBLE_PRUNED = Pattern(
    "double_pruned",
    _search_row_wise,
    along_rows=True,
    along_columns=False,
    sparse_products=2,
    search_backward=prune_again,
)
PATTERNS = {pattern.name: pattern for pattern in (TRANSPOSABLE, ROW_WISE, DOUBLE_PRUNED)}


def resolve_pattern(name: str) -> Pattern:
    """Return the pattern of that name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> resolve_pattern("transposable").sparse_products
        2
    """
    require("pattern", name, one_of(sorted(PATTERNS)))
    return PATTERNS[name]
