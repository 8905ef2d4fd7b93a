"""Criteria: how entries of a weight are scored; the mask keeps what scores highest."""

from .gradients import Fisher, Movement, WeightGradient
from .inputs import Wanda
from .interface import Criterion
from .plain import Magnitude, Random
from .registry import CRITERIA, resolve_criterion
from .scope import keep_dense_layers, keep_dense_tiles

__all__ = [
    "CRITERIA", "Criterion", "Fisher", "Magnitude", "Movement", "Random", "Wanda", "WeightGradient",
    "keep_dense_layers", "keep_dense_tiles", "resolve_criterion",
]  # fmt: skip
