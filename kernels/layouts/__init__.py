"""Layouts: packed operands in the orders of GEMM libraries."""

from .index_functions import cusparselt_sm80_place, cutlass_place, place_in_block
from .reference import from_cusparselt_sm80, from_cutlass, to_cusparselt_sm80, to_cutlass

__all__ = [
    "cusparselt_sm80_place", "cutlass_place", "from_cusparselt_sm80", "from_cutlass", "place_in_block",
    "to_cusparselt_sm80", "to_cutlass",
]  # fmt: skip
