"""Statistics: weights and masks in, sums over what is kept and pruned out."""

from .cpu import measure
from .operator import tile_statistics
from .reference import FIELDS

__all__ = ["FIELDS", "measure", "tile_statistics"]
