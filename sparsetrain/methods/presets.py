"""Presets: functions that return a :class:`Method` with the published defaults."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

from ..checks.rules import FLAG, require
from ..checks.suggestions import did_you_mean
from ..criteria import Criterion
from ..masks.gradient_rules import GradientRule
from ..types import DecayTarget, WeightProduct
from .method import Method
from .schedule import Phase, Schedule, dense_prune_retrain, from_scratch, require_length, rounds


def fst(
    refresh_every: int = 40,
    decay: float | Literal["auto"] = 6e-5,
    warmup: int | float = 0.0,
    dense_tail: int | float = 1 / 6,
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    mvue: bool = False,
    decay_ramp: int | float = 0,
    hysteresis: float = 0.0,
) -> Method:
    """Fully sparse training from scratch: moving transposable masks, masked decay on gradients, a dense tail.

    Args:
        refresh_every: Optimizer steps between two mask searches.
        decay: λ of the masked decay; the paper uses 6e-5 to 2e-4 for GPT-2 at learning rate 1.5e-4. ``"auto"`` follows
            the ratio of flip rates and needs a dense head.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of the dense tail, likewise.
        pattern: ``"transposable"`` or ``"row_wise"``.
        criterion: What ranks the entries.
        mvue: Compute weight gradients from unbiased 2:4 estimates of output gradients, as the paper does.
        decay_ramp: In which λ grows from 0 to its value, in steps (int) or as a fraction of the run (float).
        hysteresis: Bonus of entries that are kept now, as a fraction of the layer's mean score.

    Example:
        >>> fst(warmup=0.15).schedule.resolve(600).starts
        (0, 90, 500)

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024, arXiv 2404.01847.
    """
    require_length("dense_tail", dense_tail)
    return Method(
        name="fst",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=refresh_every,
        decay=decay,
        weight_product=_weight_product(mvue),
        decay_ramp=decay_ramp,
        hysteresis=hysteresis,
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


def dense_to_sparse_finetune(
    decay: float = 1e-4,
    decay_ramp: int | float = 0.25,
    freeze_at: int | float = 0.75,
    refresh_every: int = 10,
    pattern: str = "row_wise",
    criterion: str | Criterion = "magnitude",
    distillation: float = 0.0,
    temperature: float = 2.0,
) -> Method:
    """Turn a trained dense model into a sparse one: moving masks under a growing decay, then frozen masks.

    Args:
        decay: λ of the masked decay on gradients.
        decay_ramp: In which λ grows from 0 to its value, in steps (int) or as a fraction of the run (float).
        freeze_at: When masks freeze, likewise.
        refresh_every: Optimizer steps between two mask searches.
        pattern: ``"row_wise"``, as in the papers, or ``"transposable"``.
        criterion: What ranks the entries.
        distillation: Share of the divergence from the dense model in the loss, 0 to 1; AST, arXiv 2407.20584, has 0.67.
            In a loop of your own, the loss then goes through :meth:`sparsetrain.SparseTraining.distilled`.
        temperature: T of the distillation, 2 in AST.

    Example:
        >>> dense_to_sparse_finetune().schedule.resolve(1000).kinds
        ('sparse', 'frozen')

    Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025,
    arXiv 2407.20584; mask period of CAST, arXiv 2509.25996.
    """
    require_length("freeze_at", freeze_at)
    return Method(
        name="dense_to_sparse_finetune",
        pattern=pattern,
        criterion=criterion,
        schedule=Schedule((Phase("sparse", freeze_at), Phase("frozen"))),
        refresh_every=refresh_every,
        decay=decay,
        decay_ramp=decay_ramp,
        distillation=distillation,
        distillation_temperature=temperature,
    )


def iterative(
    count: int | None = None,
    start: int | float = 0.25,
    every: int | float = 0.2,
    by: Literal["layers", "density"] = "layers",
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    clear_moments: bool = True,
) -> Method:
    """Dense training, then rounds that each prune more and retrain with masks frozen.

    Args:
        count: Rounds. By layers: after round k, k / count of the layers are pruned, those that lose the least magnitude
            first; None is 3. By density there are two: 3:4, then 2:4.
        start: When the first round prunes, in steps (int) or as a fraction (float).
        every: From one round to the next, likewise.
        by: What grows: the share of ``"layers"`` that are pruned, or what all of them lose: ``"density"``.
        pattern: ``"transposable"`` or ``"row_wise"``.
        criterion: What ranks the entries.
        clear_moments: Clear the optimizer's moments of pruned entries.

    Example:
        >>> iterative().schedule.resolve(1000).starts
        (0, 250, 450, 650)

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv 1506.02626,
    with layers, or the two densities of four, as the rounds.
    """
    return Method(
        name="iterative",
        pattern=pattern,
        criterion=criterion,
        schedule=rounds(count, start, every, by),
        clear_moments=clear_moments,
    )


def recommended(
    warmup: int | float = 0.15,
    decay: float | Literal["auto"] = 2e-3,
    freeze: int | float = 0.0,
    dense_tail: int | float = 0.0,
    refresh_every: int = 40,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """Where to begin: a dense head, then moving transposable masks that a strong decay lets settle; it ends 2:4.

    Args:
        warmup: Length of the dense head, in steps (int) or as a fraction (float).
        decay: λ of the masked decay on gradients; about the peak learning rate.
        freeze: For how long masks are frozen before the tail or the end, likewise.
        dense_tail: Length of a dense tail, likewise, if the model may end dense.
        refresh_every: Optimizer steps between two mask searches.
        criterion: What ranks the entries.

    Example:
        >>> recommended().schedule.resolve(1000).starts
        (0, 150)

    Source: :func:`fst`, with the numbers that did best in ``docs/results/methods.md``, on a small model.
    """
    method = fst(refresh_every, decay, warmup, dense_tail, criterion=criterion)
    return replace(method, name="recommended", schedule=from_scratch(warmup, dense_tail, freeze))


def slope(
    adapter_rank: int = 16,
    adapter_start: int | float = 0.99,
    adapter_merge: bool = True,
    refresh_every: int = 100,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """A static row-wise mask from the start, a double-pruned backward, and low-rank adapters in the last steps.

    Args:
        adapter_rank: Of the adapters; 0 for none.
        adapter_start: When they begin, in steps (int) or as a fraction of the run (float).
        adapter_merge: Add them to the weights at the end, which are dense then.
        refresh_every: Optimizer steps between two searches of the backward's masks.
        criterion: What ranks the entries of the initial weights: ``"magnitude"`` or ``"random"``.

    Example:
        >>> slope().schedule.resolve(1000).kinds, slope().pattern
        (('frozen',), 'double_pruned')

    Source: Mozaffari et al., "SLoPe: Double-Pruned Sparse Plus Lazy Low-Rank Adapter Pretraining of LLMs", ICLR 2025,
    arXiv 2405.16325.
    """
    return Method(
        name="slope",
        pattern="double_pruned",
        criterion=criterion,
        schedule=Schedule((Phase("frozen"),)),
        refresh_every=refresh_every,
        adapter_rank=adapter_rank,
        adapter_start=adapter_start,
        adapter_merge=adapter_merge,
    )


def sr_ste(
    decay: float = 2e-4,
    pattern: str = "row_wise",
    refresh_every: int = 1,
    decay_on: DecayTarget = "by_optimizer",
    warmup: int | float = 0.0,
    dense_tail: int | float = 0.0,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """Sparse training from scratch with a new mask every step and a decay of what is pruned.

    Args:
        decay: λ of the masked decay.
        pattern: ``"row_wise"``, as in the paper, or ``"transposable"``.
        refresh_every: Optimizer steps between two mask searches.
        decay_on: ``"by_optimizer"``: on weights with SGD, as in the paper, and on gradients otherwise, which Adam
            normalises together with the decay; or one of the two by name.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of a dense tail, likewise.
        criterion: What ranks the entries.

    Example:
        >>> sr_ste().refresh_every, sr_ste().decay_on
        (1, 'by_optimizer')

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021,
    arXiv 2102.04010.
    """
    require_length("dense_tail", dense_tail)
    return Method(
        name="sr_ste",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=refresh_every,
        decay=decay,
        decay_on=decay_on,
    )


def s_ste(
    pattern: str = "row_wise",
    warmup: int | float = 0.0,
    dense_tail: int | float = 0.0,
    mvue: bool = False,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """Sparse training from scratch with soft-thresholded weights; continuous, so it needs no decay and no dense tail.

    Args:
        pattern: ``"row_wise"``, as in the paper; ``"transposable"``, with a threshold along columns, is our extension.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of a dense tail, likewise.
        mvue: Compute weight gradients from unbiased 2:4 estimates of output gradients, as the paper does.
        criterion: What ranks the entries.

    Example:
        >>> s_ste().forward, s_ste().decay
        ('soft', 0.0)

    Source: Hu, Zhu, Chen, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", NeurIPS 2024,
    arXiv 2409.09099.
    """
    require_length("dense_tail", dense_tail)
    return Method(
        name="s_ste",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=1,
        forward="soft",
        weight_product=_weight_product(mvue),
    )


def step(
    latest: int | float = 0.5,
    earliest: int | float = 0.1,
    decay: float = 2e-4,
    pattern: str = "row_wise",
    refresh_every: int = 1,
    criterion: str | Criterion = "magnitude",
    freeze_second_moments: bool = True,
) -> Method:
    """A dense head that ends when Adam's second moments have settled, then sparse training with the moments frozen.

    Args:
        latest: Longest dense head, in steps (int) or as a fraction (float).
        earliest: Shortest dense head, likewise.
        decay: λ of the masked decay on gradients.
        pattern: ``"row_wise"``, as in the paper, or ``"transposable"``.
        refresh_every: Optimizer steps between two mask searches.
        criterion: What ranks the entries.
        freeze_second_moments: Keep Adam's second moments as they are at the end of the head; False lets Adam go on.

    Example:
        >>> step().schedule.resolve(1000).starts, step().schedule.resolve(1000).earliest
        ((0, 500), (100, None))

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", ICML 2023,
    arXiv 2302.01172.
    """
    require_length("latest", latest)
    return Method(
        name="step",
        pattern=pattern,
        criterion=criterion,
        schedule=Schedule((Phase("dense", latest, earliest=earliest), Phase("sparse"))),
        refresh_every=refresh_every,
        decay=decay,
        freeze_second_moments=freeze_second_moments,
    )


PRESETS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (asp_one_shot, dense_to_sparse_finetune, fst, iterative, recommended, s_ste, slope, sr_ste, step)
}


DEFAULT_PRESET = "recommended"
"""Whose values a mapping changes that names no preset and has no schedule."""


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
    preset = PRESETS[name]
    own = list(inspect.signature(preset).parameters)
    arguments = _checked(arguments, name, own)
    changes = {key: arguments.pop(key) for key in list(arguments) if key not in own}
    method, default = preset(**arguments), preset()
    for key in changes:
        if getattr(method, key) != getattr(default, key):
            raise ValueError(
                f"method: {key!r} is given, and so is an argument of {name} that sets it ({', '.join(arguments)}): "
                "leave one of them away."
            )
    return replace(method, **changes)


def _weight_product(mvue: bool) -> WeightProduct:
    require("mvue", mvue, FLAG)
    return "mvue" if mvue else "dense"


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
    if near := did_you_mean(key, [*own, *known]):
        return f"method: {owner} has no argument {key!r}{near}; it has {has}."
    arguments = {name: list(inspect.signature(preset).parameters) for name, preset in PRESETS.items()}
    if owners := [name for name in arguments if key in arguments[name]]:
        return (
            f"method: {owner} has no argument {key!r}, which is one of {', '.join(owners)}: leave it away, or give "
            f"the method as a whole (method={owner}, method={owners[0]}); {owner} has {has}."
        )
    near = did_you_mean(key, {argument for every in arguments.values() for argument in every})
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
