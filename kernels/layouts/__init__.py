"""Layouts: packed operands in the orders of GEMM libraries."""

from ..metadata_order import cusparselt_sm80_place, cutlass_place, cutlass_sm90_place, place_in_block
from .known import cusparselt_sm80_layout, cutlass_layout, known_layout
from .learned_layout import LayoutError, LearnedLayout
from .learning import Compressor, learn_layout, verify_layout
from .reference import from_cusparselt_sm80, from_cutlass, to_cusparselt_sm80, to_cutlass

__all__ = [
    "Compressor",
    "LayoutError",
    "LearnedLayout",
    "cusparselt_sm80_layout",
    "cusparselt_sm80_place",
    "cutlass_layout",
    "cutlass_place",
    "cutlass_sm90_place",
    "from_cusparselt_sm80",
    "from_cutlass",
    "known_layout",
    "learn_layout",
    "place_in_block",
    "to_cusparselt_sm80",
    "to_cutlass",
    "verify_layout",
]
