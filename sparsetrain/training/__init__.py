"""The engine that runs a method on a model: its phases, masks, hooks and state."""

from .engine import SparseTraining

__all__ = ["SparseTraining"]
