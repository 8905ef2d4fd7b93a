"""Sparse training with transposable 2:4 masks for PyTorch and Lightning.

Names are imported on first use, so that ``import sparsetrain`` and the command line start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "backends": ("Backend",),
    "checkpoint": ("detach_pruned", "read_masks", "restore_pruned_", "sparse_state_dict"),
    "criteria": ("Criterion", "Fisher", "Magnitude", "Movement", "Random", "Wanda", "WeightGradient"),
    "layers.convolution": ("SparseConv1d", "SparseConv2d"),
    "layers.functional": ("sparse_linear",),
    "layers.linear": ("SparseLinear",),
    "layers.selection.report": ("LayerChoice", "SelectionReport"),
    "layers.selection.select_layers": ("select_layers",),
    "layers.sparsify": ("export_dense_", "sparsify_"),
    "layers.verification": ("VerificationReport", "verify"),
    "masks.gradient_rules": ("GradientRule", "scaled"),
    "masks.metrics": ("PruneMetrics", "prune_metrics"),
    "masks.search": ("is_nm", "is_transposable", "nm_mask", "transposable_codes", "transposable_mask"),
    "masks.tile_codes": ("count_flips", "decode_tiles", "encode_tiles", "transpose_tiles"),
    "methods": ("Method",),
    "methods.schedule": ("Phase", "Schedule", "dense_prune_retrain", "from_scratch"),
    "training": ("SparseTraining",),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = ("callbacks", "methods", "optim")

__all__ = [*sorted(_HOME), "methods", "optim"]

if TYPE_CHECKING:
    from . import methods as methods
    from . import optim as optim
    from .backends import Backend as Backend
    from .checkpoint.pruned_entries import detach_pruned as detach_pruned
    from .checkpoint.pruned_entries import read_masks as read_masks
    from .checkpoint.pruned_entries import restore_pruned_ as restore_pruned_
    from .checkpoint.sparse_weights import sparse_state_dict as sparse_state_dict
    from .criteria import Criterion as Criterion
    from .criteria import Fisher as Fisher
    from .criteria import Magnitude as Magnitude
    from .criteria import Movement as Movement
    from .criteria import Random as Random
    from .criteria import Wanda as Wanda
    from .criteria import WeightGradient as WeightGradient
    from .layers.convolution import SparseConv1d as SparseConv1d
    from .layers.convolution import SparseConv2d as SparseConv2d
    from .layers.functional import sparse_linear as sparse_linear
    from .layers.linear import SparseLinear as SparseLinear
    from .layers.selection.select_layers import LayerChoice as LayerChoice
    from .layers.selection.select_layers import SelectionReport as SelectionReport
    from .layers.selection.select_layers import select_layers as select_layers
    from .layers.sparsify import export_dense_ as export_dense_
    from .layers.sparsify import sparsify_ as sparsify_
    from .layers.verification import VerificationReport as VerificationReport
    from .layers.verification import verify as verify
    from .masks.gradient_rules import GradientRule as GradientRule
    from .masks.gradient_rules import scaled as scaled
    from .masks.metrics import PruneMetrics as PruneMetrics
    from .masks.metrics import prune_metrics as prune_metrics
    from .masks.search import is_nm as is_nm
    from .masks.search import is_transposable as is_transposable
    from .masks.search import nm_mask as nm_mask
    from .masks.search import transposable_codes as transposable_codes
    from .masks.search import transposable_mask as transposable_mask
    from .masks.tile_codes import count_flips as count_flips
    from .masks.tile_codes import decode_tiles as decode_tiles
    from .masks.tile_codes import encode_tiles as encode_tiles
    from .masks.tile_codes import transpose_tiles as transpose_tiles
    from .methods import Method as Method
    from .methods.schedule import Phase as Phase
    from .methods.schedule import Schedule as Schedule
    from .methods.schedule import dense_prune_retrain as dense_prune_retrain
    from .methods.schedule import from_scratch as from_scratch
    from .training.engine import SparseTraining as SparseTraining


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
