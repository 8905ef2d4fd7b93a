"""Methods: how a model is trained sparse, as plain values; presets carry the published defaults."""

from .method import Method
from .presets import PRESETS, recommended
from .pretraining import fst, s_ste, slope, sr_ste, step
from .pruning import asp_one_shot, dense_to_sparse_finetune, iterative
from .resolve import resolve_method

__all__ = [
    "PRESETS",
    "Method",
    "asp_one_shot",
    "dense_to_sparse_finetune",
    "fst",
    "iterative",
    "recommended",
    "resolve_method",
    "s_ste",
    "slope",
    "sr_ste",
    "step",
]
