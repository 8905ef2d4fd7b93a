"""The state of a run: what a checkpoint holds of it, and how it goes on from there."""

from collections.abc import Mapping
from typing import Any

from ..checkpoint.pruned_entries import PRUNED_KEY, put_back_
from ..modifiers.base import Entry
from .phases import Phases
from .state_checks import saved_timeline
from .state_versions import STATE_VERSION
from .step_hooks import StepHooks


def state_of(phases: Phases, hooks: StepHooks) -> dict[str, Any]:
    """Return the state of a run as plain numbers, strings and tensors.

    Args:
        phases: Of the run.
        hooks: On its optimizers.
    """
    run = phases.run
    parts = [(modifier.name, modifier.state_dict()) for modifier in phases.modifiers]
    return {
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


def facts_of_state(state: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a state, None for none, says of where its run was, which is the same in every process.

    Example:
        >>> facts_of_state(None)
        {'clock': None}
    """
    keys = ("clock", "kept", "exists", "active", "dense", "starts", "stepped", "last_refresh")
    return {"clock": None} if state is None else {key: state[key] for key in keys}


def resume_(phases: Phases, hooks: StepHooks, state: Mapping[str, Any]) -> None:
    """Have a run go on from a state; pruned entries that are with it are put back before weights are packed.

    Args:
        phases: Of the run.
        hooks: On its optimizers.
        state: What :func:`state_of` returned, in this version, and ``check_state`` let pass.
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
