"""Which wire the weights of a run travel by, phase by phase."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...backends import BACKENDS
from ...backends.interface import SPARSE_DTYPES
from ...distributed.peers import reshard_
from ...distributed.shards import first_cut
from ...kernels.torch_internals import fsdp_parameters, gather_afresh, gathered_size, module_of
from ...matmul.choices import backend_on
from ..masked_layer import MaskedLayer
from .wires import DoublePrunedWire, MaskedWire, PackedWire, Wire

GatherMode = Literal["auto", "masked", "packed"]
"""masked: weights travel with zeros; packed: kept entries and a byte a tile; auto: packed where products are sparse."""


def settle_wires_(model: nn.Module, layers: Mapping[str, MaskedLayer], gather: GatherMode = "auto") -> None:
    """Have FSDP2 gather every layer's weight by the wire that its phase needs; nothing is sent.

    Args:
        model: Whose layers they are.
        layers: By name, with their phase and masks settled.
        gather: What to gather where there is a choice.
    """
    wanted = {}
    for name, layer in layers.items():
        if layer.shard is not None:
            layer.shard.name = name
            if type(layer.shard.wire) is not (kind := wire_of(layer, gather)):
                wanted[id(layer)] = layer, kind
    if not wanted:
        return
    reshard_(model)
    for parameter in fsdp_parameters(model):
        module, name = module_of(parameter)
        if name == "weight" and (found := wanted.get(id(module))) is not None:
            _use(*found, parameter)


def release_(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Have FSDP2 gather the weights of layers that are dense again as those of any other.

    Args:
        model: Whose layers they are.
        layers: Whose shards were released.
    """
    reshard_(model)
    released = {id(layer) for layer in layers}
    for parameter in fsdp_parameters(model):
        if id(parameter._module_info.module) in released and parameter._module_info.param_name == "weight":
            gather_afresh(parameter)


def _use(layer: MaskedLayer, kind: type[Wire], parameter: Any) -> None:
    assert layer.shard is not None
    wire = PackedWire(gathered_size(parameter)) if kind is PackedWire else kind()
    layer.operands.wired = wire.operands if isinstance(wire, PackedWire) else None
    layer.shard.use(wire, parameter.padded_sharded_param_size, parameter.mp_policy.param_dtype)
    gather_afresh(parameter)


def wire_of(layer: MaskedLayer, gather: GatherMode) -> type[Wire]:
    """Return the kind of wire that a layer needs as it is now."""
    if not layer.is_masked:
        return MaskedWire
    if layer.backward_codes is not None:
        return DoublePrunedWire
    return MaskedWire if why_not_packed(layer, gather) else PackedWire


def why_not_packed(layer: MaskedLayer, gather: GatherMode) -> str | None:
    """Say why a layer's weight does not travel packed while its mask is in force; None if it does.

    Args:
        layer: Whose weight is spread.
        gather: What to gather where there is a choice.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> why_not_packed(SparseLinear(8, 4), "masked")
        "gather is 'masked'"
    """
    weight: Tensor = layer.weight if layer.shard is None else layer.shard.weight
    if gather == "masked":
        return "gather is 'masked'"
    if not layer.execution.transposable or layer.backward_codes is not None:
        return "its mask is not transposable, so a byte does not hold a tile's pattern"
    if not layer.is_2_4:
        return "its mask keeps more than 2:4"
    if weight.dim() != 2 or layer.transposed:
        return "it is no nn.Linear"
    if first_cut(weight) == 1:
        return "its columns are cut, which FSDP2 gathers in the weight's own shape alone"
    if gather == "auto" and not runs_sparse(layer):
        return "its products are dense here, to which masked zeros cost less"
    return None


def runs_sparse(layer: MaskedLayer) -> bool:
    """Say whether a backend with sparse products can run a layer here, in a dtype that it may have in products."""
    name = backend_on(layer.master.device.type, layer.execution.backend)
    names = [other for other in BACKENDS if other != "masked"] if name == "auto" else [name]
    device, shape = layer.master.device, layer.matrix_shape
    return any(
        name != "masked" and BACKENDS[name].why_not(device, dtype, shape) is None
        for name in names
        for dtype in _dtypes(layer)
    )


def _dtypes(layer: MaskedLayer) -> tuple[torch.dtype, ...]:
    return (layer.master.dtype,) if layer.master.dtype in SPARSE_DTYPES else tuple(SPARSE_DTYPES)
