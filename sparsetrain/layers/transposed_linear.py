"""Linear layers whose weight is stored ``[I, O]``: ``Conv1D`` of transformers, without importing that library.

The masked class has the dense one as its base, so it is made when a model first brings such a layer; a copied or
pickled layer finds it by its name in this module.
"""

import importlib
from abc import ABC
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.fx import Proxy

from ..matmul.transforms import as_leaf
from .masked_layer import MaskedLayer
from .products import multiply
from .sharded.tensor_parallel import sharded_linear

LIBRARY, DENSE_NAME = "transformers.pytorch_utils", "Conv1D"
MASKED_NAME = "SparseTransposedLinear"


def is_conv1d(kind: type) -> bool:
    """Return whether a class is ``transformers.pytorch_utils.Conv1D`` itself.

    Example:
        >>> is_conv1d(nn.Linear)
        False
    """
    return (kind.__module__, kind.__qualname__) == (LIBRARY, DENSE_NAME)


class TransposedLinear(ABC):
    """Stands for ``Conv1D`` of transformers and its subclasses in ``isinstance``, whether or not it is installed.

    Example:
        >>> isinstance(nn.Linear(8, 4), TransposedLinear)
        False
    """

    weight: nn.Parameter
    _parameters: dict[str, nn.Parameter | None]

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return any(map(is_conv1d, kind.__mro__))


class MaskedTransposedLinear(MaskedLayer):
    """What ``SparseTransposedLinear`` adds to ``Conv1D``: the mask is that of the weight's transpose ``[O, I]``."""

    transposed = True
    nf: int
    nx: int

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: ``[..., I]`` to ``[..., O]``."""
        if isinstance(x, Proxy):
            return as_leaf(self, x)
        if self.phase == "dense":
            return cast(Tensor, super().forward(x))
        if self.shard is not None:
            return sharded_linear(self, x)
        return multiply(self, x)

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        """Describe the layer as its dense class does, and its phase."""
        return f"nf={self.nf}, nx={self.nx}, phase={self.phase}"


_MASKED: dict[type, type[MaskedLayer]] = {}


def masked_class(dense_class: type) -> type[MaskedLayer]:
    """Return the masked class of ``Conv1D``, always the same.

    Args:
        dense_class: ``transformers.pytorch_utils.Conv1D``.
    """
    if dense_class not in _MASKED:
        body = {
            "__module__": __name__,
            "__doc__": "A ``Conv1D`` of transformers with a mask: same parameters and ``state_dict``, and tile codes.",
            "dense_class": dense_class,
        }
        _MASKED[dense_class] = type(MASKED_NAME, (MaskedTransposedLinear, dense_class), body)
    return _MASKED[dense_class]


if TYPE_CHECKING:
    SparseTransposedLinear: type[MaskedTransposedLinear]


def __getattr__(name: str) -> Any:
    if name != MASKED_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return masked_class(getattr(importlib.import_module(LIBRARY), DENSE_NAME))
