"""What a saved state is refused for, before anything is changed."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..checkpoint.pruned_entries import PRUNED_KEY, check_pruned
from ..checks.rules import DICT, Rule, either, optional, sequence, shown, whole
from ..checks.states import PLAIN, names_of, refuse, require_keys, require_part, require_state
from ..criteria.statistics import StatisticCriterion
from ..methods.method import Method
from ..methods.schedule import Timeline
from ..modifiers.base import Modifier, Resumed, Run
from .mask_checks import check_masks
from .mask_state import MaskState
from .phases import Phases
from .state_versions import FIRST_VERSION, STATE_VERSION

UNUSED = optional(either(DICT, sequence(Rule("anything", lambda value: True))))
"""What another method's part may have left."""


def check_state(state: Any, phases: Phases, stacklevel: int) -> None:
    """Raise ``ValueError`` if a state is damaged or of another model, and warn if it is of another method.

    Keys that are not known are the caller's own.

    Args:
        state: What :meth:`sparsetrain.SparseTraining.state_dict` returned, or what has become of it.
        phases: Of the run that is to load it.
        stacklevel: Of the warning, from here to the user's line.
    """
    run, masks = phases.run, phases.masks
    _check_form(state)
    check_masks(state, masks)
    maskable = [name for name in masks.layers if name not in (state["dense"] or ())]
    _check_progress(state, maskable, len(run.optimizers))
    if PRUNED_KEY in state:
        check_pruned({name: masks.layers[name] for name in state["active"]}, state["codes"], state[PRUNED_KEY])
    timeline = saved_timeline(state, run)
    if state["kept"] != (kept := timeline.kept_at(state["clock"])):
        raise ValueError(
            f"state has masks that keep {state['kept']!r} of four but the schedule says {kept} at step "
            f"{state['clock']}: resume with the same schedule."
        )
    here = {"method": run.method.describe(), "total_steps": run.total_steps}
    differing = [what for what, value in here.items() if state[what] != value]
    if not differing:
        _check_agreement(state, masks, run.method, timeline, len(maskable))
    resumed = Resumed(timeline.at(state["clock"])[0], state["active"], same=not differing)
    _check_parts(state, phases.modifiers, resumed)
    for what in differing:
        words = _difference(here[what], state[what])
        warnings.warn(f"resuming with another {what}: {words}.", stacklevel=stacklevel)


def _difference(here: Any, saved: Any) -> str:
    """Return two values in words, or of two methods the fields that differ."""
    if not (isinstance(here, Mapping) and isinstance(saved, Mapping)):
        return f"{here} instead of {saved}"
    fields = [name for name in here if name not in saved or saved[name] != here[name]]
    return "; ".join(f"{name} is {here[name]!r} instead of {saved.get(name)!r}" for name in fields)


def _check_form(state: Any) -> None:
    """Raise ``ValueError`` unless a state is of this version and has its keys."""
    if not isinstance(state, Mapping):
        raise ValueError(f"state is {shown(state)}: it must be what SparseTraining.state_dict() returned.")
    version = state.get("version", STATE_VERSION)
    if type(version) is not int or version != STATE_VERSION:
        raise ValueError(
            f"state has version {shown(version)} but this sparsetrain reads {FIRST_VERSION} to {STATE_VERSION}: use "
            "the version that wrote it."
        )
    rules = {
        "version": whole(),
        "clock": whole(),
        "total_steps": optional(whole(1)),
        "method": PLAIN,
        "modifiers": DICT,
    }
    require_keys(state, (*rules, "stepped", "last_refresh", "active", "starts"))
    for key, rule in rules.items():
        require_state(key, state[key], rule)


def _check_progress(state: Mapping[str, Any], maskable: Collection[str], optimizers: int) -> None:
    """Raise ``ValueError`` unless what a state says of steps and layers can be."""
    for key, rule in {
        "stepped": sequence(whole(0, optimizers - 1), unique=True),
        "last_refresh": whole(-1, state["clock"]),
        "active": names_of(maskable),
        "starts": sequence(whole(), least=1),
    }.items():
        require_state(key, state[key], rule)
    if state["active"] and not state["exists"]:
        refuse("state['exists'] is False but state['active'] has layers")


def saved_timeline(state: Mapping[str, Any], run: Run) -> Timeline:
    """Return the timeline that a state was saved with; the one here if that is of another schedule.

    Phases begin elsewhere than planned where one ended early, or where the length of the run was changed.

    Raises:
        ValueError: If the state's phases are damaged.
    """
    timeline, starts = run.timeline, state["starts"]
    if state["method"].get("schedule") != run.method.describe()["schedule"]:
        return timeline
    if len(starts) != len(timeline.starts) or starts[0] != 0 or sorted(starts) != list(starts):
        refuse(
            f"state['starts'] is {shown(starts)}: it must be {len(timeline.starts)} steps that increase from 0, one "
            "for every phase of the schedule"
        )
    return replace(timeline, starts=tuple(starts))


def _check_agreement(
    state: Mapping[str, Any], masks: MaskState, method: Method, timeline: Timeline, maskable: int
) -> None:
    """Raise ``ValueError`` if parts of a state of this very method and length contradict each other."""
    kind, _ = timeline.at(state["clock"])
    masked, active = kind != "dense", state["active"]
    least = max(1, round(timeline.share_at(state["clock"]) * maskable)) if masked else 0
    if len(active) < least or (active and not masked):
        refuse(
            f"state['active'] has {len(active)} layers but the {kind} phase at step {state['clock']} has "
            f"{f'at least {least}' if masked else 'none'}"
        )
    if state["dense"] and not (method.dense_budget and method.dense_unit == "layers"):
        refuse(f"state['dense'] has {shown(state['dense'][0])} but the method has no dense_budget of layers")
    own, saved = masks.criterion.name, state["criterion"].get("criterion")
    if isinstance(masks.criterion, StatisticCriterion) and saved != own:
        refuse(f"state['criterion'] is of {shown(saved)} but the method's is {own!r}")


def _check_parts(state: Mapping[str, Any], modifiers: Sequence[Modifier], resumed: Resumed) -> None:
    """Raise ``ValueError`` if what a state holds of modifiers is damaged, or not what this very method leaves."""
    parts: Mapping[str, Any] = state["modifiers"]
    for modifier in modifiers:
        modifier.check_state(parts.get(modifier.name), resumed)
    own = {modifier.name for modifier in modifiers}
    for name, part in parts.items():
        if name not in own:
            require_part(name, part, UNUSED)
            if resumed.same and part:
                refuse(f"state['modifiers'] has {name!r} but the method does not")
