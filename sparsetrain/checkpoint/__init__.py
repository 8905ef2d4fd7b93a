"""Checkpoints: the sparse model, everything needed to go on training it, and the weights that are evaluated."""

from .pruned_entries import (
    CHECKPOINT_KEY,
    PRUNED_KEY,
    check_pruned,
    detach_pruned,
    pruned_values,
    read_masks,
    require_pruned,
    require_same_weights,
    restore_pruned_,
    weight_key,
)
from .sparse_weights import sparse_state_dict

__all__ = [
    "CHECKPOINT_KEY",
    "PRUNED_KEY",
    "check_pruned",
    "detach_pruned",
    "pruned_values",
    "read_masks",
    "require_pruned",
    "require_same_weights",
    "restore_pruned_",
    "sparse_state_dict",
    "weight_key",
]
