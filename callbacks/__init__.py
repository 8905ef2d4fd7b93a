"""Callbacks over the sparse training engine, for Lightning and for Hugging Face's ``Trainer``.

Names are imported on first use, so that users of one trainer need not have the other.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"HuggingFaceSparseTraining": "hugging_face", "SparseTrainingCallback": "sparse_training"}

__all__ = ["HuggingFaceSparseTraining", "SparseTrainingCallback"]

if TYPE_CHECKING:
    from .hugging_face import HuggingFaceSparseTraining as HuggingFaceSparseTraining
    from .sparse_training import SparseTrainingCallback as SparseTrainingCallback


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
