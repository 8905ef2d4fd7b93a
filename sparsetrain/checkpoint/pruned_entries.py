"""Checkpoints that hold the sparse model and everything needed to go on training it.

In a sparse phase the model computes with ``W⊙M`` while the optimizer owns a dense ``W``. :func:`detach_pruned` puts
what the products see into a state dict, so that whoever loads it has the model that was evaluated, and returns the
rest; :func:`restore_pruned_` puts it back, bit for bit.
"""

import math
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks.rules import DICT, TEXT, Rule, mapping, sequence, shown, whole
from ..checks.states import refuse, tensor
from ..distributed.layouts import layout_of, matrix_layout
from ..distributed.shards import gathered, is_spread, local, spread_like
from ..kernels.tile_codes import unpack_codes
from ..kernels.torch_internals import COMPILED_MODULE, RECOMPUTED_MODULE
from ..layers.masked_layer import MaskedLayer
from ..masks.matrices import weight_of

CHECKPOINT_KEY = "sparsetrain"
"""Where a Lightning checkpoint holds the state of sparse training."""

PRUNED_KEY = "pruned_weights"
"""Where that state holds what :func:`detach_pruned` returned."""

PLAIN_KEY = "plain"
"""Where :meth:`sparsetrain.SparseTraining.sharded_state_dict` has everything that is no tensor of a fixed layout.

It is a tuple, which ``torch.distributed.checkpoint`` writes as one entry.
"""


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
            require_as_in_model(key, master, layer)
            if is_spread(master):
                pruned[name] = master.detach().clone()
                continue
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
        differ too, by a soft threshold or an adapter; to the whole master, a DTensor, where weights are sharded.
    """
    pruned = pruned_values(state_dict, layers, merge_adapters)
    for name in pruned:
        state_dict[weight_key(name)] = evaluated(layers[name], state_dict[weight_key(name)], merge_adapters)
    return pruned


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
    known = {name: values for name, values in pruned.items() if name in layers and name in codes}
    pruned = {**pruned, **{name: pruned_here(layers[name], codes[name], values) for name, values in known.items()}}
    codes = {**codes, **{name: codes_here(layers[name], codes[name]) for name in known}}
    check_pruned(layers, codes, pruned)
    put_back_(layers, codes, pruned)


def pruned_here(layer: MaskedLayer, codes: Any, values: Any) -> Any:
    """Return the values that belong to the part of a layer's weight that lies here; what is damaged as it is.

    Only a DTensor in another layout is sent.

    Args:
        layer: Whose values they are.
        codes: Those under which they were pruned: whole, a DTensor, or of the part.
        values: As :func:`detach_pruned` returned them, here or in a run of any other number of processes.
    """
    weight = layer.parameter
    layout = layout_of(weight)
    if not isinstance(values, Tensor):
        return values
    if is_spread(values) or (values.dim() > 1 and values.shape == weight.shape):
        return layout.part(values).flatten() if values.shape == weight.shape else values
    if layer.shard is None or values.dim() != 1 or not isinstance(codes, Tensor):
        return values
    out = ~unpack_codes(gathered(codes).cpu())
    places = weight_of(torch.ones_like(out) if values.numel() == out.numel() else out, weight.shape, layer.transposed)
    if places.shape != weight.shape or int(places.sum()) != values.numel():
        raise ValueError("checkpoint's pruned values do not fit its masks: the checkpoint is damaged.")
    whole = torch.zeros(weight.shape, dtype=values.dtype)
    whole[places] = values.cpu()
    return layout.part(whole)[layout.part(places)]


def codes_here(layer: MaskedLayer, codes: Any) -> Any:
    """Return the part of a layer's codes that lies here; what is damaged as it is."""
    if layer.shard is None or not isinstance(codes, Tensor) or codes.shape == layer.mask_codes.shape:
        return gathered(codes) if is_spread(codes) else codes
    return matrix_layout(layer.shard.weight, codes.dtype, layer.transposed, 4).part(codes)


@torch.no_grad()
def put_back_(layers: Mapping[str, MaskedLayer], codes: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> None:
    """Do what :func:`restore_pruned_` does with values that :func:`check_pruned` let pass."""
    for name, values in pruned.items():
        layer, weight = layers[name], layers[name].master
        places = _places(codes[name], values, layer).to(weight.device)
        weight[places] = values.flatten().to(weight.device, weight.dtype)


def check_pruned(layers: Mapping[str, MaskedLayer], codes: Any, pruned: Any) -> None:
    """Raise ``ValueError`` unless pruned values can be put back; changes nothing.

    Args:
        layers: As for :func:`restore_pruned_`.
        codes: Likewise.
        pruned: Likewise.

    Example:
        >>> check_pruned({}, {}, {})
    """
    _require("codes", codes, DICT)
    _require("pruned values", pruned, DICT)
    for name, values in pruned.items():
        if name not in layers or name not in codes:
            raise ValueError(
                f"checkpoint holds pruned values of {shown(name)}, which is no sparse layer here: use the same targets."
            )
        layer = layers[name]
        _require(f"codes of layer {name!r}", codes[name], tensor(torch.int16, layer.mask_codes.shape))
        _require(f"pruned values of layer {name!r}", values, tensor(None, None))
        if int(_places(codes[name], values, layer).sum()) != values.numel() or values.shape not in (
            layer.master.shape,
            (values.numel(),),
        ):
            raise ValueError(f"checkpoint's pruned values of {name!r} do not fit its mask: the checkpoint is damaged.")


def require_pruned(state: Any, weights: Collection[str]) -> None:
    """Raise ``ValueError`` if a checkpoint lacks pruned values of weights that it holds without them.

    Args:
        state: What the checkpoint holds under ``"sparsetrain"``; None if it holds nothing.
        weights: Names of the weights in it.

    Example:
        >>> require_pruned({"active": ["fc"], "pruned_weights": {}}, ["head.weight"])
    """
    if state is None:
        return
    _require(f"{CHECKPOINT_KEY!r}", state, mapping({"active": sequence(TEXT), PRUNED_KEY: DICT}, others=True))
    for name in state["active"]:
        if weight_key(name) in weights and name not in state[PRUNED_KEY]:
            refuse(f"checkpoint's pruned values have no {name!r}, whose weight it holds")


def _require(name: str, value: Any, rule: Rule) -> None:
    if complaint := rule.complaint(f"checkpoint's {name}", value):
        refuse(complaint)


def _places(codes: Tensor, values: Tensor, layer: MaskedLayer) -> Tensor:
    """Return where values belong, bool, shaped like the weight: where the mask prunes, or everywhere."""
    out = ~unpack_codes(codes)
    return layer.as_weight(torch.ones_like(out) if values.numel() == layer.master.numel() else out)


def evaluated(layer: MaskedLayer, master: Tensor, with_adapter: bool) -> Tensor:
    """Return the weight that a layer's products see; a DTensor if the master, spread like the weight, is one.

    Args:
        layer: Whose mask is in force.
        master: Shaped like the weight.
        with_adapter: Add the adapter, if there is one.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> evaluated(SparseLinear(4, 4), torch.ones(4, 4), with_adapter=True).sum()
        tensor(16.)
    """
    seen = layer.effective_weight(local(master), with_adapter)
    return spread_like(seen, master, master.shape) if is_spread(master) else seen


def require_as_in_model(key: str, value: Tensor, layer: MaskedLayer) -> None:
    """Raise ``ValueError`` unless a weight of a state dict is spread over processes as it is in the model.

    Args:
        key: Its name in the state dict.
        value: The weight there.
        layer: Whose weight it is.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> require_as_in_model("fc.weight", torch.ones(4, 8), SparseLinear(8, 4))
    """
    weight = layer.parameter
    if layout_of(value)[2:] != layout_of(weight)[2:]:
        found, own = ("a DTensor" if is_spread(one) else "whole" for one in (value, weight))
        raise ValueError(
            f"state_dict's {key!r} is {found} but the model's weight is {own if own != found else 'spread otherwise'}: "
            "pass the model's own state dict, and gather or cut what comes back."
        )


def weight_key(name: str) -> str:
    """Return the name of a layer's weight in a state dict, which leaves out the model itself and checkpoint wrappers.

    Example:
        >>> weight_key("fc"), weight_key("")
        ('fc.weight', 'weight')
    """
    return f"{name.replace(f'{RECOMPUTED_MODULE}.', '')}.weight" if name else "weight"


def plain_key(key: str) -> str:
    """Return the name of a weight where nothing is compiled, as some functions of torch that save models give it.

    Example:
        >>> plain_key("blocks.0._orig_mod.fc.weight")
        'blocks.0.fc.weight'
    """
    return key.replace(f"{COMPILED_MODULE}.", "")


def read_masks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the masks out of a checkpoint of a run with ``SparseTrainingCallback``.

    Args:
        checkpoint: What ``torch.load(path)`` returned.

    Returns:
        Layer name to bool mask, shaped like the layer's weight.

    Raises:
        ValueError: If the checkpoint holds no state of sparse training, or a damaged one.

    Example:
        >>> codes = {"fc": torch.full((1, 1), 0x3C3C, dtype=torch.int16)}
        >>> state = {"codes": codes, "shapes": {"fc": [4, 4]}, "transposed": []}
        >>> read_masks({"sparsetrain": state})["fc"].sum().item()
        8
    """
    if not isinstance(checkpoint, Mapping) or CHECKPOINT_KEY not in checkpoint:
        raise ValueError(
            f"checkpoint has no key {CHECKPOINT_KEY!r}: it must come from a run with SparseTrainingCallback "
            "that saved more than weights."
        )
    state = checkpoint[CHECKPOINT_KEY]
    _require(
        f"{CHECKPOINT_KEY!r}",
        state,
        mapping({"codes": DICT, "shapes": DICT, "transposed": sequence(TEXT)}, others=True),
    )
    codes, shapes, transposed = state["codes"], state["shapes"], state["transposed"]
    for name in codes:
        _require(f"shape of layer {name!r}", shapes.get(name), sequence(whole(1), least=2))
        rows, columns = shapes[name][0], math.prod(shapes[name][1:])
        size = (columns // 4, rows // 4) if name in transposed else (rows // 4, columns // 4)
        _require(f"codes of layer {name!r}", codes[name], tensor(torch.int16, size))
    return {name: weight_of(unpack_codes(codes[name]), shapes[name], name in transposed) for name in codes}


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
