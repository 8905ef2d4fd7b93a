"""Methods: how a model is trained sparse, as plain values; presets carry the published defaults."""

from .method import Method
from .presets import PRESETS, resolve_method
from .presets import asp_one_shot as asp_one_shot
from .presets import fst as fst

__all__ = ["PRESETS", "Method", "asp_one_shot", "fst", "resolve_method"]
