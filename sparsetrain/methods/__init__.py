"""Methods: how a model is trained sparse, as plain values; presets carry the published defaults."""

from .method import Method
from .presets import PRESETS, resolve_method
from .presets import asp_one_shot as asp_one_shot
from .presets import dense_to_sparse_finetune as dense_to_sparse_finetune
from .presets import fst as fst
from .presets import iterative as iterative
from .presets import recommended as recommended
from .presets import s_ste as s_ste
from .presets import slope as slope
from .presets import sr_ste as sr_ste
from .presets import step as step

__all__ = [
    "PRESETS", "Method", "asp_one_shot", "dense_to_sparse_finetune", "fst", "iterative", "recommended",
    "resolve_method", "s_ste", "slope", "sr_ste", "step",
]  # fmt: skip
