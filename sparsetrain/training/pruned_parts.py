"""Pruned entries of a saved state, as they lie here where weights are sharded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.pruned_entries import PRUNED_KEY
from ..distributed.layouts import layout_of
from ..distributed.shards import gathered, is_spread, part_like
from ..kernels.tile_codes import unpack_codes
from ..layers.masked_layer import MaskedLayer
from ..masks.matrices import weight_of
from .state_layouts import Path, tensor_at


def pruned_parts(state: Mapping[str, Any], layers: Mapping[str, MaskedLayer]) -> dict[Path, Tensor]:
    """Return the pruned entries of the parts of sharded weights that lie here, by their paths in a state.

    What does not fit its mask is left out, to be refused. If codes or entries are DTensors, every process has to call
    this.

    Args:
        state: With whole entries of sharded weights, as one process saves them, or DTensors of whole masters.
        layers: By name.
    """
    found: dict[Path, Tensor] = {}
    for name, layer in layers.items():
        path, weight = (PRUNED_KEY, name), layer.weight if layer.shard is None else layer.shard.weight
        values, codes = tensor_at(state, path), tensor_at(state, ("codes", name))
        if values is None or codes is None or not (is_spread(weight) or is_spread(values)):
            continue
        if values.numel() == weight.numel():
            whole = values if is_spread(values) else values.view(weight.shape)
            found[path] = layout_of(weight).part(whole).flatten()
            continue
        codes = gathered(codes)
        pruned = weight_of(~unpack_codes(codes), weight.shape, layer.transposed).to(values.device)
        if pruned.shape != weight.shape or int(pruned.sum()) != values.numel():
            continue
        whole = torch.zeros(weight.shape, dtype=values.dtype, device=values.device)
        whole[pruned] = values
        found[path] = part_like(whole, weight)[part_like(pruned, weight)] if is_spread(weight) else values
    return found
