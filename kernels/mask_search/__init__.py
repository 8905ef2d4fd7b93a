"""Mask search: scores in, tile codes or row-wise masks out."""

from .cpu import ranking_keys, search_row_wise, search_transposable
from .cpu_permutations import search_permutations
from .operator import search_tiles, search_tiles_, search_tiles_with_mask
from .reference import NONFINITE_KEY

__all__ = [
    "NONFINITE_KEY",
    "ranking_keys",
    "search_permutations",
    "search_row_wise",
    "search_tiles",
    "search_tiles_",
    "search_tiles_with_mask",
    "search_transposable",
]
