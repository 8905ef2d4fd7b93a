"""Which wire the weights of a run travel by, phase by phase."""

from collections.abc import Mapping, Sequence

from torch import nn

from ...distributed.peers import reshard_
from ...kernels.torch_internals import fsdp_parameters, gather_afresh
from ..masked_layer import MaskedLayer
from .wires import DoublePrunedWire, MaskedWire, Wire


def settle_wires_(model: nn.Module, layers: Mapping[str, MaskedLayer]) -> None:
    """Have FSDP2 gather every layer's weight by the wire that its phase needs; nothing is sent.

    Args:
        model: Whose layers they are.
        layers: By name, with their phase and masks settled.
    """
    changed = {}
    for name, layer in layers.items():
        if layer.shard is not None:
            layer.shard.name = name
            if type(layer.shard.wire) is not (wanted := wire_of(layer)):
                changed[id(layer)] = layer.shard, wanted()
    if not changed:
        return
    reshard_(model)
    for parameter in fsdp_parameters(model):
        shard, wire = changed.get(id(parameter._module_info.module), (None, None))
        if shard is not None and wire is not None and parameter._module_info.param_name == "weight":
            shard.use(wire, parameter.padded_sharded_param_size, parameter.mp_policy.param_dtype)
            gather_afresh(parameter)


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


def wire_of(layer: MaskedLayer) -> type[Wire]:
    """Return the kind of wire that a layer needs as it is now."""
    return DoublePrunedWire if layer.is_masked and layer.backward_codes is not None else MaskedWire
