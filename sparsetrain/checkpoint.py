"""Checkpoints that hold the sparse model and everything needed to go on training it.

In a sparse phase the model computes with ``W⊙M`` while the optimizer owns a dense ``W``. :func:`detach_pruned` puts
what the products see into a state dict, so that whoever loads it has the model that was evaluated, and returns the
rest; :func:`restore_pruned_` puts it back, bit for bit.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .kernels.tile_codes.reference import unpack_codes
from .masked_layer import MaskedLayer
from .matrices import weight_of

CHECKPOINT_KEY = "sparsetrain"
"""Where a Lightning checkpoint holds the state of sparse training."""


@torch.no_grad()
def pruned_values(
    state_dict: Mapping[str, Any], layers: Mapping[str, MaskedLayer], merge_adapters: bool = False
) -> dict[str, Tensor]:
    """Return what a state dict loses when :func:`sparsetrain.sparse_state_dict` replaces the masters in it.

    Args:
        state_dict: Holds masters.
        layers: Layer name to layer; those whose mask is not in force lose nothing.
        merge_adapters: Whether adapters that are in use are added.

    Returns:
        As :func:`detach_pruned`.
    """
    pruned = {}
    for name, layer in layers.items():
        if layer.is_masked and (key := weight_key(name)) in state_dict:
            master = state_dict[key]
            changed = layer.soft_scale is not None or (merge_adapters and layer.adapter is not None)
            pruned[name] = (master.flatten() if changed else master[~layer.mask.to(master.device)]).clone()
    return pruned


def detach_pruned(
    state_dict: MutableMapping[str, Any], layers: Mapping[str, MaskedLayer], merge_adapters: bool = False
) -> dict[str, Tensor]:
    """Replace the masters of masked layers in a state dict by what products see, and return what is lost by that.

    Args:
        state_dict: Changed in place; its tensors are not.
        layers: Layer name to layer; those whose mask is not in force are left alone.
        merge_adapters: Add the adapters that are in use.

    Returns:
        Layer name to the pruned entries of its weight, in row-major order; to all entries where those that are kept
        differ too, by a soft threshold or an adapter.
    """
    pruned = pruned_values(state_dict, layers, merge_adapters)
    for name in pruned:
        state_dict[weight_key(name)] = layers[name].effective_weight(state_dict[weight_key(name)], merge_adapters)
    return pruned


@torch.no_grad()
def restore_pruned_(
    layers: Mapping[str, MaskedLayer], codes: Mapping[str, Tensor], pruned: Mapping[str, Tensor]
) -> None:
    """Put pruned values back into the weights.

    Args:
        layers: Layer name to layer.
        codes: Layer name to the tile codes under which the values were pruned.
        pruned: What :func:`detach_pruned` returned.

    Raises:
        ValueError: If the values do not fit the layers; nothing is changed then.
    """
    masks = {}
    for name, values in pruned.items():
        if name not in layers or name not in codes:
            raise ValueError(
                f"checkpoint holds pruned values of {name!r}, which is no sparse layer here: use the same targets."
            )
        weight = layers[name].weight
        out = ~unpack_codes(codes[name])
        if values.numel() == weight.numel():
            out = torch.ones_like(out)
        if out.numel() != weight.numel() or int(out.sum()) != values.numel():
            raise ValueError(f"checkpoint's pruned values of {name!r} do not fit its mask: the checkpoint is damaged.")
        masks[name] = layers[name].as_weight(out)
    for name, values in pruned.items():
        weight = layers[name].weight
        weight[masks[name].to(weight.device)] = values.to(weight.device, weight.dtype)


def weight_key(name: str) -> str:
    """Return the name of a layer's weight in a state dict; the model itself has no name.

    Example:
        >>> weight_key("fc"), weight_key("")
        ('fc.weight', 'weight')
    """
    return f"{name}.weight" if name else "weight"


def read_masks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the masks out of a checkpoint of a run with ``SparseTrainingCallback``.

    Args:
        checkpoint: What ``torch.load(path)`` returned.

    Returns:
        Layer name to bool mask, shaped like the layer's weight.

    Raises:
        ValueError: If the checkpoint holds no state of sparse training.

    Example:
        >>> codes = {"fc": torch.full((1, 1), 0x3C3C, dtype=torch.int16)}
        >>> state = {"codes": codes, "shapes": {"fc": [4, 4]}, "transposed": []}
        >>> read_masks({"sparsetrain": state})["fc"].sum().item()
        8
    """
    if CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            f"checkpoint has no key {CHECKPOINT_KEY!r}: it must come from a run with SparseTrainingCallback "
            "that saved more than weights."
        )
    state = checkpoint[CHECKPOINT_KEY]
    return {
        name: weight_of(unpack_codes(codes), state["shapes"][name], name in state["transposed"])
        for name, codes in state["codes"].items()
    }


def require_same_weights(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Check that a state dict is of this model, before anything is loaded.

    Args:
        model: Any module.
        state_dict: What would be loaded into it.
        strict: Names must be the same too.

    Raises:
        ValueError: If a shape differs or, with ``strict``, a name is only on one side.
    """
    own = {name: value for name, value in model.state_dict().items() if not is_lazy(value)}
    for name, value in state_dict.items():
        if name in own and isinstance(value, Tensor) and value.shape != own[name].shape:
            raise ValueError(
                f"checkpoint is of another model: {name!r} is {tuple(value.shape)} there and {tuple(own[name].shape)} "
                "here; build the model with the checkpoint's hyper-parameters."
            )
    if strict and (lonely := set(state_dict) ^ set(own)):
        name = min(lonely)
        raise ValueError(
            f"checkpoint is of another model: {name!r} is only in the {'model' if name in own else 'checkpoint'}; "
            "build the model with the checkpoint's hyper-parameters."
        )
