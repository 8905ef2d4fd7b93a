"""Lightning callbacks over the sparse training engine."""

from .sparse_training import SparseTrainingCallback

__all__ = ["SparseTrainingCallback"]
