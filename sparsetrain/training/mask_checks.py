"""What a saved state of masks is refused for, before anything is changed."""

from collections.abc import Mapping
from typing import Any

import torch

from ..checks.rules import DICT, EMPTY, FLAG, NOT_NEGATIVE, TEXT, Rule, either, optional, sequence, shown, whole
from ..checks.states import by_layer, names_of, refuse, require_keys, require_state, tensor
from ..masks.tile_codes import KEEP_ALL
from .mask_state import STATE_KEYS, MaskState


def check_masks(state: Mapping[str, Any], masks: MaskState) -> None:
    """Raise ``ValueError`` if a state is damaged or of another model.

    Args:
        state: What :meth:`MaskState.state_dict` returned, or what has become of it.
        masks: Those that are to load it.
    """
    require_keys(state, STATE_KEYS)
    for key, rule in {
        "pattern": TEXT,
        "codes": DICT,
        "exists": FLAG,
        "kept": whole(2, 3),
        "transposed": sequence(TEXT),
    }.items():
        require_state(key, state[key], rule)
    _check_origin(state, masks)
    require_state("dense", state["dense"], optional(names_of(masks.layers)))
    maskable = [name for name in masks.layers if name not in (state["dense"] or ())]
    if not maskable:
        refuse("state['dense'] holds every layer")
    for key, rule in _rules(masks, maskable, state["exists"]).items():
        require_state(key, state[key], rule)
    for name in masks.layers:
        _check_codes(name, state, masks, masked=state["exists"] and name in maskable)
    sizes = {
        name: (4 * layer.mask_codes.shape[0], 4 * layer.mask_codes.shape[1], layer.input_features)
        for name, layer in masks.layers.items()
    }
    masks.criterion.check_state_dict(state["criterion"], sizes)


def _rules(masks: MaskState, maskable: list[str], exists: bool) -> dict[str, Rule]:
    """Return the rules of what a state holds of every layer."""
    layers = masks.layers
    codes = {name: tensor(torch.int16, layer.mask_codes.shape) for name, layer in layers.items()}
    again = codes if exists and masks.pattern.search_backward is not None else {}
    flips = {name: whole(0, layers[name].weight.numel()) for name in maskable}
    ages = {name: tensor(torch.uint8, layer.master.shape) for name, layer in layers.items()}
    sums = sequence(NOT_NEGATIVE, length=5)
    return {
        "codes": by_layer(codes, needed=None),
        "backward_codes": by_layer(again, needed=[name for name in again if name in maskable]),
        "flips": either(EMPTY, by_layer(flips, needed=None)),
        "virtual_flips": either(EMPTY, by_layer(flips, needed=None)),
        "sums_at_refresh": either(EMPTY, by_layer(dict.fromkeys(maskable, sums), needed=None)),
        "ages": either(EMPTY, by_layer(ages, needed=None)),
    }


def _check_origin(state: Mapping[str, Any], masks: MaskState) -> None:
    """Raise ``ValueError`` unless a state is of these layers and this pattern."""
    if state["pattern"] != masks.pattern.name:
        raise ValueError(
            f"state has pattern {state['pattern']!r} but the method has {masks.pattern.name!r}: "
            "resume with the same method."
        )
    saved, here = set(state["codes"]), set(masks.layers)
    if saved != here:
        missing, extra = (sorted(map(shown, names)) for names in (here - saved, saved - here))
        raise ValueError(
            "state is of another model or selection: "
            + "; ".join(
                text
                for text in (
                    f"it has no layer {', '.join(missing[:3])}" if missing else "",
                    f"the model has no sparse layer {', '.join(extra[:3])}" if extra else "",
                )
                if text
            )
            + "; resume with the same model and targets."
        )
    require_state("shapes", state["shapes"], by_layer(dict.fromkeys(masks.layers, sequence(whole())), needed=None))
    for name, layer in masks.layers.items():
        if (saved_shape := list(state["shapes"][name])) != (here_shape := list(layer.weight.shape)):
            raise ValueError(
                f"state's layer {name!r} has a weight {saved_shape} but the model's is {here_shape}: resume with "
                "the same model."
            )
        if (name in state["transposed"]) != layer.transposed:
            order = "[in, out]" if name in state["transposed"] else "[out, in]"
            raise ValueError(
                f"state's layer {name!r} has a weight stored {order} but the model's is not: resume with the same "
                "model."
            )


def _check_codes(name: str, state: Mapping[str, Any], masks: MaskState, masked: bool) -> None:
    """Raise ``ValueError`` unless a layer's codes are masks of the pattern, or keep everything."""
    codes = state["codes"][name]
    if masked and bool(masks.search.count_violations(codes, state["kept"])):
        raise ValueError(
            f"state's codes of layer {name!r} are no {masks.pattern.name} masks: the checkpoint is damaged, or "
            "its method allows others; resume with the same method."
        )
    if not masked and bool((codes != KEEP_ALL).any()):
        refuse(f"state's codes of layer {name!r} prune, but it has no mask yet or stays dense")
    again = state["backward_codes"].get(name)
    if again is not None and int(masks.pattern.count_backward_violations(again)):
        raise ValueError(
            f"state's backward codes of layer {name!r} do not keep two of four along out_features: the "
            "checkpoint is damaged or of another version."
        )
