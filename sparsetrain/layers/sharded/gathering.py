"""Which wire the weights of a run travel by, phase by phase."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ...backends import BACKENDS
from ...backends.interface import SPARSE_DTYPES
from ...distributed.peers import fsdp_modules, is_gathered, is_parallel, reshard_
from ...distributed.shards import first_cut
from ...kernels.torch_internals import (
    follow_resets,
    fsdp_parameters,
    gather_afresh,
    gathered_size,
    leave_resets,
    module_of,
)
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
    for name, layer in layers.items():
        if layer.shard is not None:
            layer.shard.name = name
    _follow(model, {id(layer): layer for layer in layers.values() if layer.shard and not layer.shard.is_followed})
    _use(model, {id(layer): (layer, wire_of(layer, gather)) for layer in layers.values() if layer.shard is not None})


def _follow(model: nn.Module, layers: Mapping[int, MaskedLayer]) -> None:
    """Hang on local tensors that FSDP2 puts into the weights' place to pad them; layers are given by their ids."""
    for parameter in fsdp_parameters(model) if layers else ():
        module, name = module_of(parameter)
        if name == "weight" and (layer := layers.get(id(module))) is not None and layer.shard is not None:
            follow_resets(parameter, partial(_attach, layer))
            layer.shard.is_followed = True


def _attach(layer: MaskedLayer) -> None:
    if layer.shard is not None:
        layer.shard.attach()


def _use(model: nn.Module, wanted: Mapping[int, tuple[MaskedLayer, type[Wire]]]) -> None:
    """Have layers, by their ids, use a kind of wire."""
    changed = {
        number: (layer, kind)
        for number, (layer, kind) in wanted.items()
        if layer.shard is not None and type(layer.shard.wire) is not kind
    }
    if not changed:
        return
    reshard_(fsdp_modules(model))
    for parameter in fsdp_parameters(model):
        module, name = module_of(parameter)
        if name == "weight" and (found := changed.pop(id(module), None)) is not None:
            _exchange(*found, parameter)
    for layer, _ in changed.values() if is_gathered(model) else ():
        if not is_parallel(model, layer.weight):
            raise RuntimeError(
                f"layer {layer.shard and layer.shard.name!r} is sharded but FSDP2 knows it under another module: make "
                "the run of the model that fully_shard was applied to, or use gather='masked'."
            )


def release_wires_(model: nn.Module, layers: Iterable[MaskedLayer]) -> None:
    """Have FSDP2 gather the weights of layers that are about to be dense as they are.

    Args:
        model: Whose layers they are.
        layers: Some of them.
    """
    shards = {id(layer.shard.weight): layer.shard for layer in layers if layer.shard is not None}
    if not shards:
        return
    reshard_(fsdp_modules(model))
    for shard in shards.values():
        shard.detach()
    for parameter in fsdp_parameters(model):
        if id(parameter.sharded_param) in shards:
            leave_resets(parameter)
            gather_afresh(parameter)


def _exchange(layer: MaskedLayer, kind: type[Wire], parameter: Any) -> None:
    assert layer.shard is not None
    wire = PackedWire(gathered_size(parameter)) if kind is PackedWire else kind()
    layer.operands.wired = wire.operands if isinstance(wire, PackedWire) else None
    layer.shard.use(wire, parameter.padded_sharded_param_size, parameter.mp_policy.param_dtype)
    gather_afresh(parameter, layer.shard.send())


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
    weight = layer.parameter
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


def wires_in_words(model: nn.Module, layers: Mapping[str, MaskedLayer], gather: GatherMode) -> dict[str, str]:
    """Return by which wire every layer's weight travels while its mask is in force, and why; {} where none travels.

    Args:
        model: Whose layers they are.
        layers: By name.
        gather: What to gather where there is a choice.

    Example:
        >>> wires_in_words(nn.Linear(4, 4), {}, "auto")
        {}
    """
    if not is_gathered(model):
        return {}
    reasons = {name: why_not_packed(layer, gather) for name, layer in layers.items() if layer.shard is not None}
    return {name: f"gathered masked: {reason}" if reason else "gathered packed" for name, reason in reasons.items()}


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
