"""Masked update: what a mask does to weights and gradients between steps, in place, from tile codes."""

from .reference import add_masked_decay_, apply_mask_

__all__ = ["add_masked_decay_", "apply_mask_"]
