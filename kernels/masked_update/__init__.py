"""Masked update: what a mask does to weights and gradients between steps, in place, from tile codes."""

from .operator import add_masked_decays_, apply_masks_
from .reference import add_masked_decay_, apply_mask_

__all__ = ["add_masked_decay_", "add_masked_decays_", "apply_mask_", "apply_masks_"]
