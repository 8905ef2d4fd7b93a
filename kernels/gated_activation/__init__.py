"""Gated activation: SwiGLU, GEGLU and ReLU² for operands in either layout."""

from .operator import gated_activation, gated_activation_backward
from .reference import KINDS, activate, differentiate

__all__ = ["KINDS", "activate", "differentiate", "gated_activation", "gated_activation_backward"]
