"""Criteria: how entries of a weight are scored; the mask keeps what scores highest."""

from ..masks.dense_budget import keep_dense_layers, keep_dense_tiles
from .criterion import Criterion
from .gradients import Fisher, Movement, WeightGradient
from .inputs import Wanda
from .registry import CRITERIA, resolve_criterion
from .stateless import Magnitude, Random
from .statistics import StatisticCriterion

__all__ = [
    "CRITERIA",
    "Criterion",
    "Fisher",
    "Magnitude",
    "Movement",
    "Random",
    "StatisticCriterion",
    "Wanda",
    "WeightGradient",
    "keep_dense_layers",
    "keep_dense_tiles",
    "resolve_criterion",
]
