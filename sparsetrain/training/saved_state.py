"""The state of a run: what a checkpoint holds of it, and how it goes on from there."""

from collections.abc import Mapping
from typing import Any

from ..checkpoint.pruned_entries import PRUNED_KEY, pruned_here, put_back_
from ..checks.states import PLAIN
from ..distributed.agreement import together
from ..distributed.equal_codes import Groups
from ..layers.masked_layer import MaskedLayer
from ..modifiers.base import Entry
from .phases import Phases
from .sharded_state import in_nested_form
from .state_checks import check_state, saved_timeline
from .state_layouts import Path, replaced, required_layouts, spread, tensor_at
from .state_versions import STATE_VERSION, in_this_version
from .step_hooks import StepHooks


def state_of(phases: Phases, hooks: StepHooks) -> dict[str, Any]:
    """Return the state of a run as plain numbers, strings and tensors.

    Where weights are sharded, tensors are DTensors that are spread like them; all processes have to call this.

    Args:
        phases: Of the run.
        hooks: On its optimizers.
    """
    run = phases.run
    parts = [(modifier.name, modifier.state_dict()) for modifier in phases.modifiers]
    state = {
        "version": STATE_VERSION,
        "clock": run.clock,
        "total_steps": run.total_steps,
        "method": run.method.describe(),
        "stepped": sorted(hooks.stepped),
        "last_refresh": phases.last_refresh,
        "active": sorted(run.active),
        "starts": list(run.timeline.starts),
        "modifiers": {name: part for name, part in parts if part is not None},
        **phases.masks.state_dict(),
    }
    return spread(state, phases)


def received(state: Any, phases: Phases, everyone: Groups, stacklevel: int) -> dict[str, Any]:
    """Return a state in this version with the parts that lie here, once all processes have found it sound.

    Args:
        state: What :func:`state_of` or :func:`.sharded_state.in_fixed_layout` returned, or what has become of it;
            instead of DTensors, it may have whole tensors.
        phases: Of the run that is to load it.
        everyone: The processes that load it together.
        stacklevel: Of warnings, from here to the user's line.

    Raises:
        RuntimeError: If another process refuses it.
        ValueError: If it is damaged or of another model, or differs between processes.
    """
    layers = phases.masks.layers
    device = next(iter(layers.values())).master.device
    with together(everyone, "the state", device) as note:
        state = with_pruned_here(in_this_version(in_nested_form(state)), layers)
        layouts = required_layouts(state, phases)
        tensors: dict[Path, Any] = {path: tensor_at(state, path) for path in sorted(layouts, key=str)}
        sent = [str(path) for path in tensors if not layouts[path].holds(tensors[path])]
        note(lambda: {**facts_of_state(state), "tensors in another layout": sent})
    parts = {path: layouts[path].part(tensor) for path, tensor in tensors.items()}
    with together(everyone, "the state", device):
        found: dict[str, Any] = replaced(state, parts)
        check_state(found, phases, stacklevel)
    return found


def described_in(state: Any) -> Any:
    """Return the method of a state as it was described, whatever its version; None if there is none.

    Example:
        >>> described_in({"version": STATE_VERSION, "method": {"name": "fst"}})
        {'name': 'fst'}
    """
    try:
        state = in_this_version(in_nested_form(state))
    except ValueError:  # whoever loads it says so
        return None
    found = state.get("method") if isinstance(state, Mapping) else None
    return found if PLAIN.accepts(found) else None


def with_pruned_here(state: Any, layers: Mapping[str, MaskedLayer]) -> Any:
    """Return a state with the pruned values that belong to the parts of the weights that lie here, if it has any."""
    pruned, codes = (state.get(key) if isinstance(state, Mapping) else None for key in (PRUNED_KEY, "codes"))
    if not (isinstance(pruned, Mapping) and isinstance(codes, Mapping)):
        return state
    whole = [name for name in pruned if name in layers and getattr(pruned[name], "ndim", 0) == 1]
    here = {name: pruned_here(layers[name], codes.get(name), pruned[name]) for name in whole}
    return {**state, PRUNED_KEY: {**pruned, **here}}


def facts_of_state(state: Any) -> dict[str, Any]:
    """Return what a state, None for none, says of where its run was, which is the same in every process.

    Example:
        >>> facts_of_state(None)
        {'clock': None}
    """
    keys = ("clock", "kept", "exists", "active", "dense", "starts", "stepped", "last_refresh")
    return {"clock": None} if not isinstance(state, Mapping) else {key: state.get(key) for key in keys}


def resume_(phases: Phases, hooks: StepHooks, state: Mapping[str, Any]) -> None:
    """Have a run go on from a state; pruned entries that are with it are put back before weights are packed.

    Args:
        phases: Of the run.
        hooks: On its optimizers.
        state: What :func:`received` returned.
    """
    run, masks, total_steps = phases.run, phases.masks, phases.run.total_steps
    masks.load_state_dict(state)
    put_back_(masks.layers, state["codes"], state.get(PRUNED_KEY, {}))
    run.groups.forget()
    for layer in masks.layers.values():
        layer.operands.invalidate()
    run.clock, run.active = state["clock"], frozenset(state["active"])
    phases.last_refresh, hooks.stepped = state["last_refresh"], set(state["stepped"])
    run.timeline = saved_timeline(state, run)
    for modifier in phases.modifiers:
        modifier.load_state_dict(state["modifiers"].get(modifier.name))
    phases.settle(Entry(resumed=True))
    run.groups.number_draws_(masks.layers, run.clock)
    phases.repack_()
    if state["total_steps"] != total_steps:
        phases.retime(None if total_steps is None else max(total_steps, run.clock))
