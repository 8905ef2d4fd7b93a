"""What a run is refused for, before anything is changed: its set-up, and a state to go on from."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .criteria import resolve_criterion
from .frozen_moments import require_freezable
from .mask_state import MaskState
from .masked_decay import AUTO_START
from .methods.method import Method
from .optimizer_hooks import owned_parameters
from .running import run_of
from .schedule import Timeline
from .second_moments import require_second_moments
from .selection import SelectionReport

STATE_VERSION = 4

STATE_KEYS = frozenset(
    {"version", "clock", "method", "stepped", "last_refresh", "lr_restart", "active", "starts", "moments", "adapters",
     "total_steps", "decay", "distillation", "frozen_moments", "soft_scales", "pattern", "exists", "kept", "dense",
     "codes", "shapes", "backward_codes", "flips", "virtual_flips", "sums_at_refresh", "ages", "criterion",
     "transposed"}
)  # fmt: skip


def check_setup(
    model: nn.Module, report: SelectionReport, method: Method, timeline: Timeline, optimizers: Sequence[Optimizer],
    lr_schedulers: Sequence[LRScheduler], total_steps: int | None, watch_dense: bool,
) -> None:  # fmt: skip
    """Raise ``ValueError`` if a run cannot be set up in this way."""
    if not optimizers:
        raise ValueError("optimizer is an empty list: pass the optimizer that owns the model's weights.")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("model is wrapped in FSDP: masks need whole weights on every rank, so use DDP or one device.")
    for choice in report.dense:
        if choice.reason.startswith("already sparse") and (run := run_of(model.get_submodule(choice.name))):
            raise ValueError(
                f"layer {choice.name!r} is trained by another SparseTraining, at step {run.clock}: call its finish() "
                "first, with zeros=False to go on from the dense weights, or exclude the layer."
            )
    _check_weights(model, report, optimizers)
    head = timeline.head or 0
    searches = 3 if _missing(report, method) else 2  # the first of which waits for statistics
    if method.decay == "auto" and watch_dense and (total_steps or head) < searches * method.refresh_every > head:
        warnings.warn(
            f"decay is 'auto' but the run's {total_steps} steps are too few to adjust it: λ stays at {AUTO_START}.",
            stacklevel=4,
        )
    elif method.decay == "auto" and not (watch_dense and head >= searches * method.refresh_every):
        raise ValueError(
            f"decay is 'auto' but no dense phase of {searches} refreshes comes before the sparse one: give the "
            f"schedule a dense head of at least {searches * method.refresh_every} steps, or a number for decay."
        )
    for name in method.fractions if total_steps is None else ():
        raise ValueError(f"total_steps is None but {name} is a fraction: pass total_steps, or give it in steps.")
    if method.dense_budget and method.dense_unit == "layers":
        _check_budget(report, method.dense_budget)
    if timeline.earliest:
        require_second_moments(optimizers)
    if method.freeze_second_moments:
        if (first := method.schedule.first_kind) != "dense":
            raise ValueError(
                f"freeze_second_moments is True but the first phase is {first}: begin with a dense phase, "
                "in which second moments form, or set it to False."
            )
        require_freezable(optimizers)
    if method.restart_lr and not lr_schedulers:
        raise ValueError("method has restart_lr=True but lr_schedulers is empty: pass the learning-rate schedulers.")


def check_statistics(report: SelectionReport, method: Method) -> None:
    """Raise ``ValueError`` if masks are searched before the criterion can have gathered anything.

    A dense head that is a fraction is one, even if it rounds to no step of a short run; the search then warns.
    """
    missing = _missing(report, method)
    if missing and method.schedule.first_kind != "dense":
        raise ValueError(
            f"criterion is {resolve_criterion(method.criterion).name!r} but masks are searched before the first step, "
            f"when it has no statistics of layer {missing[0]!r}: give the schedule a dense head of some steps (warmup, "
            "prune_at or start), or use criterion='magnitude'."
        )


def _missing(report: SelectionReport, method: Method) -> list[str]:
    return resolve_criterion(method.criterion).missing(choice.name for choice in report.sparse)


def _check_budget(report: SelectionReport, budget: float) -> None:
    smallest = min(report.sparse, key=lambda choice: choice.count)
    share = smallest.count / sum(choice.count for choice in report.sparse)
    if share > budget:
        raise ValueError(
            f"dense_budget is {budget} but the smallest layer, {smallest.name!r}, has {share:.3f} of the weights: "
            "raise it to that at least, or use dense_unit='tiles'."
        )


def _check_weights(model: nn.Module, report: SelectionReport, optimizers: Sequence[Optimizer]) -> None:
    owned = set().union(*map(owned_parameters, optimizers))
    for choice in report.sparse:
        weight = model.get_submodule(choice.name).weight
        assert isinstance(weight, Tensor)
        if weight.requires_grad and id(weight) not in owned:
            raise ValueError(
                f"layer {choice.name!r} has a trainable weight that no optimizer owns: "
                "pass every optimizer, or exclude the layer."
            )


def check_state(
    state: Mapping[str, Any], masks: MaskState, method: Method, total_steps: int | None, timeline: Timeline
) -> None:  # fmt: skip
    """Raise ``ValueError`` if a state is damaged or of another model, and warn if it is of another method."""
    if state.get("version", STATE_VERSION) != STATE_VERSION:
        raise ValueError(
            f"state has version {state.get('version')!r} but this sparsetrain reads {STATE_VERSION}: "
            "use the version that wrote it."
        )
    if missing := STATE_KEYS - set(state):
        raise ValueError(f"state has no {sorted(missing)[0]!r}: it must be what SparseTraining.state_dict() returned.")
    if not isinstance(state["clock"], int) or state["clock"] < 0:
        raise ValueError(
            f"state has clock {state['clock']!r}: it must be an int of at least 0; the checkpoint is damaged."
        )
    if state["kept"] != (kept := saved_timeline(state, method, timeline).kept_at(state["clock"])):
        raise ValueError(
            f"state has masks that keep {state['kept']!r} of four but the schedule says {kept} at step "
            f"{state['clock']}: resume with the same schedule."
        )
    masks.check_state_dict(state)
    if unknown := sorted({*state["active"], *state["soft_scales"], *(state["dense"] or ())} - set(masks.layers)):
        raise ValueError(f"state has active layer {unknown[0]!r} that the model has not: resume with the same model.")
    for what, saved, here in (
        ("method", state["method"], method.describe()),
        ("total_steps", state["total_steps"], total_steps),
    ):
        if saved != here:
            warnings.warn(f"resuming with another {what}: {here} instead of {saved}.", stacklevel=5)


def saved_timeline(state: Mapping[str, Any], method: Method, timeline: Timeline) -> Timeline:
    """Return the timeline that a state was saved with; the one here if that is of another schedule.

    Raises:
        ValueError: If the state's phases are damaged.
    """
    if state["method"]["schedule"] != method.describe()["schedule"]:
        return timeline
    starts = state["starts"]
    whole = isinstance(starts, list | tuple) and all(type(start) is int for start in starts)
    if not whole or len(starts) != len(timeline.starts) or starts[0] != 0 or sorted(starts) != list(starts):
        raise ValueError(
            f"state has starts {starts!r}: they must be {len(timeline.starts)} steps that increase from 0, one for "
            "every phase of the schedule; the checkpoint is damaged."
        )
    return replace(timeline, starts=tuple(starts))
