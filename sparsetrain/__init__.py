"""Sparse training with transposable 2:4 masks for PyTorch and Lightning.

Names are imported on first use, so that ``import sparsetrain`` and the command line start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "backends": ("Backend",),
    "checkpoint": ("detach_pruned", "read_masks", "restore_pruned_"),
    "criteria": ("Criterion", "Fisher", "Magnitude", "Movement", "Random", "Wanda", "WeightGradient"),
    "gradient_rules": ("GradientRule", "scaled"),
    "masks": ("is_nm", "is_transposable", "nm_mask", "transposable_codes", "transposable_mask"),
    "methods": ("Method",),
    "metrics": ("PruneMetrics", "prune_metrics"),
    "schedule": ("Phase", "Schedule", "dense_prune_retrain", "from_scratch"),
    "selection": ("LayerChoice", "SelectionReport", "select_layers"),
    "convolution": ("SparseConv1d", "SparseConv2d"),
    "linear": ("SparseLinear", "sparse_linear"),
    "sparse_weights": ("sparse_state_dict",),
    "sparsify": ("export_dense_", "sparsify_"),
    "tiles": ("count_flips", "decode_tiles", "encode_tiles", "transpose_tiles"),
    "training": ("SparseTraining",),
    "verification": ("VerificationReport", "verify"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = ("callbacks", "methods", "optim")

__all__ = [*sorted(_HOME), "methods", "optim"]

if TYPE_CHECKING:
    from . import methods as methods
    from . import optim as optim
    from .backends import Backend as Backend
    from .checkpoint import detach_pruned as detach_pruned
    from .checkpoint import read_masks as read_masks
    from .checkpoint import restore_pruned_ as restore_pruned_
    from .convolution import SparseConv1d as SparseConv1d
    from .convolution import SparseConv2d as SparseConv2d
    from .criteria import Criterion as Criterion
    from .criteria import Fisher as Fisher
    from .criteria import Magnitude as Magnitude
    from .criteria import Movement as Movement
    from .criteria import Random as Random
    from .criteria import Wanda as Wanda
    from .criteria import WeightGradient as WeightGradient
    from .gradient_rules import GradientRule as GradientRule
    from .gradient_rules import scaled as scaled
    from .linear import SparseLinear as SparseLinear
    from .linear import sparse_linear as sparse_linear
    from .masks import is_nm as is_nm
    from .masks import is_transposable as is_transposable
    from .masks import nm_mask as nm_mask
    from .masks import transposable_codes as transposable_codes
    from .masks import transposable_mask as transposable_mask
    from .methods import Method as Method
    from .metrics import PruneMetrics as PruneMetrics
    from .metrics import prune_metrics as prune_metrics
    from .schedule import Phase as Phase
    from .schedule import Schedule as Schedule
    from .schedule import dense_prune_retrain as dense_prune_retrain
    from .schedule import from_scratch as from_scratch
    from .selection import LayerChoice as LayerChoice
    from .selection import SelectionReport as SelectionReport
    from .selection import select_layers as select_layers
    from .sparse_weights import sparse_state_dict as sparse_state_dict
    from .sparsify import export_dense_ as export_dense_
    from .sparsify import sparsify_ as sparsify_
    from .tiles import count_flips as count_flips
    from .tiles import decode_tiles as decode_tiles
    from .tiles import encode_tiles as encode_tiles
    from .tiles import transpose_tiles as transpose_tiles
    from .training import SparseTraining as SparseTraining
    from .verification import VerificationReport as VerificationReport
    from .verification import verify as verify


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
