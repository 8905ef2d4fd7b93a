"""The state of a run in a fixed layout, for ``torch.distributed.checkpoint``, and as it comes back from there."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checkpoint.pruned_entries import PLAIN_KEY
from ..checks.rules import DICT, TEXT, either, mapping, sequence, whole
from ..checks.states import refuse, require_state
from ..distributed.shards import gathered, is_spread
from .state_layouts import Layouts, Path, replaced, tensor_at, tensors_in

PLAIN = sequence(mapping({"state": DICT, "tensors": sequence(sequence(either(TEXT, whole())))}), length=1)


def in_fixed_layout(state: Mapping[str, Any], layouts: Layouts) -> dict[str, Any]:
    """Return a state as a flat dict that has the same tensors in every phase; all processes have to call this.

    Args:
        state: With DTensors where weights are sharded.
        layouts: Of the tensors that are there in any phase; zeros stand in for those that are not there yet.
    """
    there = {path: tensor for path in layouts if (tensor := tensor_at(state, path)) is not None}
    others = {path: gathered(tensor) for path, tensor in tensors_in(state) if path not in there and is_spread(tensor)}
    rest = replaced(state, {**dict.fromkeys(there), **others})
    tensors = {_key(path): there[path] if path in there else layout.zeros() for path, layout in layouts.items()}
    return {PLAIN_KEY: ({"state": rest, "tensors": [list(path) for path in there]},), **tensors}


def in_nested_form(state: Any) -> Any:
    """Return what :func:`in_fixed_layout` made as the state that it was; anything else as it is.

    Raises:
        ValueError: If it is damaged.

    Example:
        >>> in_nested_form(in_fixed_layout({"clock": 3}, {}))
        {'clock': 3}
    """
    if not isinstance(state, Mapping) or PLAIN_KEY not in state or "clock" in state:
        return state
    require_state(PLAIN_KEY, state[PLAIN_KEY], PLAIN)
    (plain,) = state[PLAIN_KEY]
    found: dict[Path, Any] = {}
    for path in map(tuple, plain["tensors"]):
        if isinstance(tensor := state.get(_key(path)), Tensor):
            found[path] = tensor
        elif path[0] == "ages":  # which a run that tracks none does not load
            found[path[:1]] = {}
        else:
            refuse(f"state has no tensor {_key(path)!r}")
    return replaced(plain["state"], found)


def _key(path: Path) -> str:
    return ".".join(map(str, path))
