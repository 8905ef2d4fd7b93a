"""Masks: how they are searched, stored and measured, and what of a gradient passes them."""

from .gradient_rules import GradientRule, scaled
from .metrics import PruneMetrics, prune_metrics
from .search import is_nm, is_transposable, nm_mask, transposable_codes, transposable_mask
from .tile_codes import count_flips, decode_tiles, encode_tiles, transpose_tiles

__all__ = [
    "GradientRule",
    "PruneMetrics",
    "count_flips",
    "decode_tiles",
    "encode_tiles",
    "is_nm",
    "is_transposable",
    "nm_mask",
    "prune_metrics",
    "scaled",
    "transposable_codes",
    "transposable_mask",
    "transpose_tiles",
]
