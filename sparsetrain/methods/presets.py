"""Presets: functions that return a :class:`Method` with the published defaults."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ..criteria import Criterion
from ..schedule import Phase, Schedule, dense_prune_retrain, from_scratch
from .method import Method


def fst(
    refresh_every: int = 40,
    decay: float = 6e-5,
    warmup: int | float = 0.0,
    dense_tail: int | float = 1 / 6,
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    mvue: bool = False,
) -> Method:
    """Fully sparse training from scratch: moving transposable masks, masked decay on gradients, a dense tail.

    Args:
        refresh_every: Optimizer steps between two mask searches.
        decay: λ of the masked decay; the paper uses 6e-5 to 2e-4 for GPT-2 at learning rate 1.5e-4.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of the dense tail, likewise.
        pattern: ``"transposable"`` or ``"row_wise"``.
        criterion: What ranks the entries.
        mvue: Compute weight gradients from unbiased 2:4 estimates of output gradients, as the paper does.

    Example:
        >>> fst(warmup=0.15).schedule.resolve(600).starts
        (0, 90, 500)

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024, arXiv 2404.01847.
    """
    return Method(
        name="fst",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=refresh_every,
        decay=decay,
        weight_product="mvue" if mvue else "dense",
    )


def asp_one_shot(
    prune_at: int | float = 0.5,
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    clear_moments: bool = True,
    restart_lr: bool = False,
) -> Method:
    """Dense training, one pruning, retraining with the mask frozen and pruned weights at zero.

    Args:
        prune_at: When to prune, in steps (int) or as a fraction (float); 0 prunes before the first step.
        pattern: ``"transposable"``, or ``"row_wise"`` as in the paper.
        criterion: What ranks the entries.
        clear_moments: Clear the optimizer's moments of pruned entries.
        restart_lr: Restart the learning-rate schedule for the retraining.

    Example:
        >>> asp_one_shot(prune_at=0).schedule.resolve(600).kinds
        ('frozen',)

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.
    """
    return Method(
        name="asp_one_shot",
        pattern=pattern,
        criterion=criterion,
        schedule=dense_prune_retrain(prune_at),
        clear_moments=clear_moments,
        restart_lr=restart_lr,
    )


PRESETS: dict[str, Callable[..., Method]] = {"fst": fst, "asp_one_shot": asp_one_shot}


def resolve_method(method: str | Method | Mapping[str, Any]) -> Method:
    """Return a method from a preset's name, from a mapping, or the method itself.

    A mapping with the key ``preset`` holds that preset's arguments; another one holds the fields of :class:`Method`.

    Raises:
        ValueError: If the preset, or a key of the mapping, is unknown.
        TypeError: If it is none of these.

    Example:
        >>> resolve_method({"preset": "fst", "warmup": 0.15}).name
        'fst'
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        method = {"preset": method}
    if not isinstance(method, Mapping):
        raise TypeError(f"method is {method!r}: it must be a preset's name ({_names()}), a Method, or a mapping.")
    arguments = dict(method)
    if "preset" not in arguments:
        return Method(**_checked(arguments, "Method", [field.name for field in fields(Method)]))
    name = arguments.pop("preset")
    if name not in PRESETS:
        raise ValueError(f"method is {name!r}: it must be one of the presets {_names()}, or a Method.")
    preset = PRESETS[name]
    return preset(**_checked(arguments, name, list(inspect.signature(preset).parameters)))


def _names() -> str:
    return ", ".join(map(repr, sorted(PRESETS)))


def _checked(arguments: dict[str, Any], owner: str, allowed: list[str]) -> dict[str, Any]:
    for key in arguments:
        if key not in allowed:
            raise ValueError(f"method: {owner} has no argument {key!r}; it has {', '.join(allowed)}.")
    schedule = arguments.get("schedule")
    if schedule is not None and not isinstance(schedule, Schedule):
        phases = schedule["phases"] if isinstance(schedule, Mapping) else schedule
        arguments["schedule"] = Schedule(
            tuple(Phase(**phase) if isinstance(phase, Mapping) else phase for phase in phases)
        )
    return arguments
