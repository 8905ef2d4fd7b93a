"""States of earlier versions, brought into the form that this version reads."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..checks.states import require_keys

PARTS = ("lr_restart", "adapters", "moments", "decay", "frozen_moments", "distillation", "soft_scales")
"""What is under ``modifiers`` since version 5."""


def in_this_version(state: Any) -> Any:
    """Return a state of an earlier version as this version writes it; anything else as it is.

    Raises:
        ValueError: If a key of that version is missing.

    Example:
        >>> in_this_version({"version": 3, "clock": 7, "method": {}, **dict.fromkeys(PARTS)})["modifiers"]
        {}
    """
    while isinstance(state, Mapping):
        version = state.get("version")
        if type(version) is not int or version not in NEXT:
            break
        state = {**NEXT[version](state), "version": version + 1}
    return state


def _from_3(state: Mapping[str, Any]) -> dict[str, Any]:
    """No layer stored its weight transposed then, frozen second moments were corrections, sums were of all layers."""
    require_keys(state, ("frozen_moments",))
    frozen = state["frozen_moments"]
    if isinstance(frozen, list):
        frozen = [_with_going(entries) for entries in frozen]
    return {**state, "transposed": [], "frozen_moments": frozen, "sums_at_refresh": {}}


def _from_4(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a method switches on had keys beside all others, also where it was off."""
    require_keys(state, PARTS)
    parts = {name: state[name] for name in PARTS if state[name] is not None}
    if isinstance(scales := parts.get("soft_scales"), dict) and not scales:  # as of a hard mask
        del parts["soft_scales"]
    return {**{name: value for name, value in state.items() if name not in PARTS}, "modifiers": parts}


def _from_5(state: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizers owned adapters always then, and had what they know of them, or a trainer's checkpoint had it apart."""
    require_keys(state, ("modifiers",))
    parts = state["modifiers"]
    if isinstance(parts, Mapping) and parts.get("adapters") is not None:
        parts = {**parts, "adapters": {"values": parts["adapters"], "optimizer": state.get("apart")}}
    return {**state, "modifiers": parts}


def _from_6(state: Mapping[str, Any]) -> dict[str, Any]:
    """No decay began before masks were in force."""
    return _with_field(state, "decay_in_head", False)


def _from_7(state: Mapping[str, Any]) -> dict[str, Any]:
    """No method was another one for pretrained models."""
    return _with_field(state, "if_pretrained", {})


def _from_8(state: Mapping[str, Any]) -> dict[str, Any]:
    """No kept weights were re-fitted."""
    return _with_field(state, "refit", False)


def _from_9(state: Mapping[str, Any]) -> dict[str, Any]:
    """Sums of inputs did not say of how many tokens they are, and were damped as if of many."""
    require_keys(state, ("modifiers",))
    parts = state["modifiers"]
    sums = parts.get("refit") if isinstance(parts, Mapping) else None
    if isinstance(sums, Mapping):
        parts = {**parts, "refit": {name: _with_tokens(value) for name, value in sums.items()}}
    return {**state, "modifiers": parts}


def _from_10(state: Mapping[str, Any]) -> dict[str, Any]:
    """Layers with masks had the optimizer's learning rate."""
    return _with_field(state, "lr_factor", 1.0)


def _with_field(state: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Return a state whose method has a field more."""
    require_keys(state, ("method",))
    method = state["method"]
    return {**state, "method": {**method, name: value} if isinstance(method, Mapping) else method}


def _with_tokens(sums: Any) -> Any:
    return F.pad(sums, (0, 0, 0, 1), value=1e9) if isinstance(sums, Tensor) and sums.dim() == 3 else sums


def _with_going(entries: Any) -> Any:
    if not isinstance(entries, list):
        return entries
    return [{"correction": entry, "going": None} if isinstance(entry, float) else entry for entry in entries]


NEXT: dict[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    3: _from_3,
    4: _from_4,
    5: _from_5,
    6: _from_6,
    7: _from_7,
    8: _from_8,
    9: _from_9,
    10: _from_10,
}
"""By version, what brings a state into the form of the one after it."""

STATE_VERSION = max(NEXT) + 1
"""Of what :meth:`sparsetrain.SparseTraining.state_dict` returns."""

FIRST_VERSION = min(NEXT)
"""The earliest that can be read."""
