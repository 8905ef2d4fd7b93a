"""``resolve_method``: what users write for a method, made a :class:`Method`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ..checks.suggestions import did_you_mean
from ..masks.gradient_rules import GradientRule
from .method import Method
from .presets import DEFAULT_PRESET, PRESETS
from .schedule import Phase, Schedule


def resolve_method(method: str | Method | Mapping[str, Any]) -> Method:
    """Return a method from a preset's name, from a mapping, or the method itself.

    A mapping with the key ``preset`` holds that preset's arguments, and any other fields of :class:`Method` to change.
    One without it holds the fields of :class:`Method` if ``schedule`` is among them; otherwise it changes
    ``recommended``.

    Raises:
        ValueError: If the preset, or a key of the mapping, is unknown.
        TypeError: If it is none of these.

    Example:
        >>> method = resolve_method({"preset": "fst", "warmup": 0.15, "dense_budget": 0.1})
        >>> method.schedule.phases[0].length, method.dense_budget
        (0.15, 0.1)
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        method = {"preset": method}
    if not isinstance(method, Mapping):
        raise TypeError(f"method is {method!r}: it must be a preset's name ({_names()}), a Method, or a mapping.")
    arguments = dict(method)
    if "preset" not in arguments and "schedule" in arguments:
        return Method(**_checked(arguments, "Method", []))
    name = arguments.pop("preset", DEFAULT_PRESET)
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(
            f"method is {name!r}: it must be one of the presets {_names()}, or a Method{did_you_mean(name, PRESETS)}."
        )
    return _changed_preset(name, arguments)


def _changed_preset(name: str, arguments: dict[str, Any]) -> Method:
    """Return a preset called with those of the arguments that it has, and with the others as fields of the method."""
    preset = PRESETS[name]
    own = list(inspect.signature(preset).parameters)
    arguments = _checked(arguments, name, own)
    changes = {key: arguments.pop(key) for key in list(arguments) if key not in own}
    method, default = preset(**arguments), preset()
    for key in changes:
        if getattr(method, key) != getattr(default, key):
            raise ValueError(
                f"method: {key!r} is given, and so is an argument of {name} that sets it ({', '.join(arguments)}): "
                "leave one of them out."
            )
    # what a user wrote down holds for pretrained models too
    others = {key: value for key, value in method.if_pretrained.items() if key not in changes}
    changes.setdefault("if_pretrained", others)
    return replace(method, **changes)


def _names() -> str:
    return ", ".join(map(repr, sorted(PRESETS)))


def _checked(arguments: dict[str, Any], owner: str, own: Sequence[str]) -> dict[str, Any]:
    """Refuse keys that are neither the preset's nor fields of ``Method``; make objects of what configs hold plainly."""
    known = [field.name for field in fields(Method)]
    for key in arguments:
        if key not in own and key not in known:
            raise ValueError(_no_argument(key, owner, own, known))
    schedule = arguments.get("schedule")
    if schedule is not None and not isinstance(schedule, Schedule):
        arguments["schedule"] = _schedule_of(schedule)
    for key in ("gradient", "frozen_gradient"):
        if isinstance(rule := arguments.get(key), Mapping):
            arguments[key] = _rule_of(key, rule)
    return arguments


def _no_argument(key: object, owner: str, own: Sequence[str], known: Sequence[str]) -> str:
    has = ", ".join([*own, "and the fields of Method"] if own else known)
    arguments = {name: list(inspect.signature(preset).parameters) for name, preset in PRESETS.items()}
    if owners := [name for name in arguments if key in arguments[name]]:
        return (
            f"method: {owner} has no argument {key!r}, which is one of {', '.join(owners)}: leave it out "
            f"(method={owner} alone drops all arguments), or take a preset that has it (preset={owners[0]!r}); "
            f"{owner} has {has}."
        )
    every = {argument for some in arguments.values() for argument in some}
    near = did_you_mean(key, [*own, *known]) or did_you_mean(key, every)
    return f"method: {owner} has no argument {key!r}{near}; it has {has}."


def _rule_of(key: str, rule: Mapping[str, Any]) -> GradientRule:
    if unknown := [name for name in rule if name not in ("kept", "pruned")]:
        raise ValueError(f"method: {key} has no {unknown[0]!r}; it has kept and pruned.")
    return GradientRule(**rule)


def _schedule_of(schedule: Any) -> Schedule:
    phases = schedule.get("phases") if isinstance(schedule, Mapping) else schedule
    if not isinstance(phases, Sequence) or isinstance(phases, str):
        raise TypeError(f"schedule is {schedule!r}: it must be a Schedule, or a list of phases, or have 'phases'.")
    known = [field.name for field in fields(Phase)]
    for phase in phases:
        if isinstance(phase, Mapping) and (unknown := set(phase) - set(known)):
            wrong = min(unknown, key=str)
            raise ValueError(
                f"schedule: a phase has no {wrong!r}; it has {', '.join(known)}{did_you_mean(wrong, known)}."
            )
    return Schedule(tuple(Phase(**phase) if isinstance(phase, Mapping) else phase for phase in phases))
