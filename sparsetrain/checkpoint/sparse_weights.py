"""``sparse_state_dict``: a state dict that holds the weights that are evaluated, not their dense masters."""

import copy
import functools
from collections.abc import Iterable, MutableMapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..distributed.shards import local
from ..distributed.wrappers import plain_model
from ..layers.masked_layer import MaskedLayer
from .pruned_entries import evaluated, require_as_in_model, weight_key


def sparse_state_dict(
    model: nn.Module, state_dict: MutableMapping[str, Any] | None = None, *, merge_adapters: bool = True
) -> MutableMapping[str, Any]:
    """Return ``model.state_dict()`` with what is evaluated: ``W⊙M`` where a mask is in force.

    ``model.state_dict()`` holds the dense masters, as resuming needs them. Keys and shapes here are those of the dense
    model, too. Without masks in force it equals ``model.state_dict()``.

    Args:
        model: The model or a part of it; data-parallel, compiled and Fabric wrappers may be around it.
        state_dict: Of dense masters, to change a copy of instead, such as one gathered on the CPU, or a part of it;
            named as in ``model`` or in what it wraps.
        merge_adapters: Add low-rank adapters that are in use, as the model computes with them.

    Returns:
        Name to tensor. Tensors without a mask are those of the state dict itself.

    Raises:
        ValueError: If ``state_dict`` holds the weight of no masked layer, although there are some; or whole weights of
            a model whose weights are sharded: pass DTensors, which come back as such, and gather those.

    Example:
        >>> from sparsetrain import sparsify_
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = sparsify_(model, verbose=False)
        >>> [int((weights["0.weight"] == 0).sum()) for weights in (model.state_dict(), sparse_state_dict(model))]
        [0, 32]

    For Hugging Face models: ``model.save_pretrained(folder, state_dict=sparse_state_dict(model))``.
    """
    if state_dict is None:
        with evaluated_in_state_dicts(model.modules(), merge_adapters):
            return model.state_dict()
    changed = copy.copy(state_dict)
    layers = _masked_weights(model)
    found = layers.keys() & changed.keys()
    if layers and not found:
        raise ValueError(
            f"state_dict has no weight of a masked layer, such as {next(iter(layers))!r}: pass the state dict of this "
            "model, with its names."
        )
    for key in found:
        require_as_in_model(key, changed[key], layers[key])
    for key in found:
        changed[key] = evaluated(layers[key], changed[key], merge_adapters)
    return changed


def evaluated_in_state_dicts(modules: Iterable[nn.Module], merge_adapters: bool = True) -> ExitStack:
    """Have every ``state_dict()`` that a masked layer takes part in hold what is evaluated, until this is closed.

    The hooks are on the layers, so that prefixes, shared modules and wrappers are torch's to name. With
    ``keep_vars=True`` the parameters themselves are returned, as they are what is asked for.

    Args:
        modules: Those of them that are masked layers get a hook.
        merge_adapters: Add low-rank adapters that are in use.

    Example:
        >>> import torch
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 8)
        >>> layer.set_codes_(torch.full((2, 2), 0x3C3C, dtype=torch.int16))
        >>> with evaluated_in_state_dicts([layer]):
        ...     int((layer.state_dict()["weight"] == 0).sum())
        32
    """
    hooks = ExitStack()
    for module in modules:
        if isinstance(module, MaskedLayer):
            hook = functools.partial(_put_evaluated, merge_adapters=merge_adapters)
            hooks.callback(module.register_state_dict_post_hook(hook).remove)  # type: ignore[no-untyped-call]
    return hooks


def _put_evaluated(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, merge_adapters: bool
) -> None:
    key = prefix + "weight"
    value = state_dict.get(key)
    if not isinstance(module, MaskedLayer) or not module.is_masked or isinstance(value, nn.Parameter):
        return
    # another hook may have been here first
    if isinstance(value, Tensor) and local(value).data_ptr() == module.master.data_ptr():
        state_dict[key] = evaluated(module, value, merge_adapters)


def _masked_weights(model: nn.Module) -> dict[str, MaskedLayer]:
    """Return the names of masked weights, in the model and in what it wraps; a shared module has several."""
    return {
        weight_key(name): module
        for source in (model, plain_model(model))
        for name, module in source.named_modules(remove_duplicate=False)
        if isinstance(module, MaskedLayer) and module.is_masked
    }
