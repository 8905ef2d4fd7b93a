"""Dense layers into masked ones and back, in place: parameters, names, hooks and ties stay as they are."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from ..distributed.shards import local
from ..matmul.execution import Execution
from ..types import PhaseKind
from .convolution import SparseConv1d, SparseConv2d
from .linear import SparseLinear
from .masked_layer import MaskedLayer
from .transposed_linear import TransposedLinear, masked_class

SPARSE_CLASSES: dict[type[nn.Module], type[MaskedLayer]] = {
    masked.dense_class: masked for masked in (SparseLinear, SparseConv1d, SparseConv2d)
}
"""Dense class to masked class, but for classes of libraries that need not be there."""


def to_sparse_(layer: nn.Module, phase: PhaseKind = "sparse", execution: Execution | None = None) -> MaskedLayer:
    """Turn a layer of exactly one of the classes that can be masked into a masked layer; its mask keeps everything.

    Example:
        >>> type(to_sparse_(nn.Linear(8, 4))).__name__
        'SparseLinear'
    """
    dense_class = type(layer)
    layer.__class__ = masked_class(dense_class) if isinstance(layer, TransposedLinear) else SPARSE_CLASSES[dense_class]
    sparse = cast(MaskedLayer, layer)
    try:
        sparse._add_mask(phase, execution or Execution())
    except BaseException:
        sparse._remove_mask()
        layer.__class__ = dense_class
        raise
    return sparse


def to_dense_(layer: MaskedLayer, zeros: bool = True) -> nn.Module:
    """Turn a masked layer back into its dense class; with ``zeros``, a mask in force is written into the weight.

    Example:
        >>> layer = to_sparse_(nn.Linear(8, 4))
        >>> type(to_dense_(layer)).__name__
        'Linear'
    """
    if zeros and layer.is_masked:
        layer.master.data.copy_(layer.effective_weight(layer.master.data))
    layer._remove_mask()
    dense = cast(nn.Module, layer)
    dense.__class__ = layer.dense_class
    return dense


def write_zeros_(layers: Mapping[str, nn.Module], codes: Mapping[str, Tensor]) -> None:
    """Write zeros into what masks prune of dense layers.

    Args:
        layers: Layer name to a layer that could be masked.
        codes: Layer name to its int16 tile codes ``[O/4, K/4]``.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 4)
        >>> write_zeros_({"fc": layer}, {"fc": torch.full((1, 1), 0x000F, dtype=torch.int16)})
        >>> (layer.weight == 0).sum().item()
        12
    """
    for name, layer in layers.items():
        sparse = to_sparse_(layer, "frozen")
        sparse.set_codes_(local(codes[name]))
        to_dense_(sparse)
