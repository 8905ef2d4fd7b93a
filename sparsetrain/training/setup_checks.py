"""What a run is refused for when it is set up, before anything is changed."""

import inspect
import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ..criteria import resolve_criterion
from ..distributed.peers import is_parallel
from ..layers.claims import run_of
from ..layers.selection.report import SelectionReport, first_few
from ..methods.method import Method
from ..methods.presets import PRESETS
from ..methods.schedule import Timeline
from ..modifiers.base import Setup
from ..modifiers.masked_decay import AUTO_START
from ..modifiers.registry import check_all
from .shard_checks import check_shards
from .step_hooks import owned_parameters

HEADS = ("warmup", "prune_at", "start")
"""Arguments of presets that give the schedule a dense head."""


def check_setup(setup: Setup, report: SelectionReport, backend: str) -> None:
    """Raise ``ValueError`` if a run cannot be set up in this way.

    Args:
        setup: What it is to be made of.
        report: Of the layers that are to become sparse.
        backend: Of their products, or ``"auto"``.
    """
    model, method = setup.model, setup.method
    if method.mixes_tiles and backend not in ("auto", "masked"):
        raise ValueError(f"backend is {backend!r} but dense_unit is 'tiles': mixed tiles need 'masked' or 'auto'.")
    if not setup.optimizers:
        raise ValueError("optimizer is an empty list: pass the optimizer that owns the model's weights.")
    for choice in report.dense:
        if choice.reason.startswith("already sparse") and (run := run_of(model.get_submodule(choice.name))):
            raise ValueError(
                f"layer {choice.name!r} is trained by another SparseTraining, at step {run.clock}: call its finish() "
                "first, with zeros=False to go on from the dense weights, or exclude the layer."
            )
    check_shards(setup, {choice.name: model.get_submodule(choice.name) for choice in report.sparse})
    _check_weights(model, report, setup.optimizers)
    _check_parallel(model, report)
    _warn_of_frozen(report, method, setup.timeline)
    if method.decay == "auto":
        _check_auto_decay(setup, searches=3 if _missing(report, method) else 2)  # the first waits for statistics
    for name in method.fractions if setup.total_steps is None else ():
        raise ValueError(f"total_steps is None but {name} is a fraction: pass total_steps, or give it in steps.")
    if method.dense_budget and method.dense_unit == "layers":
        _check_budget(report, method.dense_budget)
    check_all(setup)


def check_statistics(report: SelectionReport, method: Method) -> None:
    """Raise ``ValueError`` if masks are searched before the criterion can have gathered anything.

    A dense head that is a fraction is one, even if it rounds to no step of a short run; the search then warns.
    """
    missing = _missing(report, method)
    if missing and method.schedule.first_kind != "dense":
        known = inspect.signature(PRESETS[method.name]).parameters if method.name in PRESETS else ()
        argument = next((f" ({name})" for name in HEADS if name in known), "")
        raise ValueError(
            f"criterion is {resolve_criterion(method.criterion).name!r} but masks are searched before the first step, "
            f"when it has no statistics of layer {missing[0]!r}: give the schedule a dense head of some steps"
            f"{argument}, or use criterion='magnitude'."
        )


def _missing(report: SelectionReport, method: Method) -> list[str]:
    return resolve_criterion(method.criterion).missing(choice.name for choice in report.sparse)


def _warn_of_frozen(report: SelectionReport, method: Method, timeline: Timeline) -> None:
    """Warn of weights that get zeros and are not trained, unless masks only come and go."""
    gets_zeros = timeline.kinds[-1] != "dense" or (method.frozen_in_place and "frozen" in timeline.kinds)
    # a base layer under peft's adapters is frozen on purpose
    names = first_few([repr(choice.name) for choice in report.frozen if not choice.name.endswith("base_layer")])
    if names and gets_zeros:
        warnings.warn(
            f"weights of sparse layers have requires_grad=False: {names}; what masks prune there becomes zero and "
            "cannot recover, so exclude these layers unless that is wanted.",
            stacklevel=6,
        )


def _check_auto_decay(setup: Setup, searches: int) -> None:
    """Raise ``ValueError`` unless a dense head shows how often masks flip there, and warn of too short a run."""
    head, needed = setup.timeline.head or 0, searches * setup.method.refresh_every
    if setup.watch_dense and (setup.total_steps or head) < needed > head:
        warnings.warn(
            f"decay is 'auto' but the run's {setup.total_steps} steps are too few to adjust it: λ stays at "
            f"{AUTO_START}.",
            stacklevel=6,
        )
    elif not (setup.watch_dense and head >= needed):
        raise ValueError(
            f"decay is 'auto' but no dense phase of {searches} refreshes comes before the sparse one: give the "
            f"schedule a dense head of at least {needed} steps, or a number for decay."
        )


def _check_budget(report: SelectionReport, budget: float) -> None:
    smallest = min(report.sparse, key=lambda choice: choice.count)
    share = smallest.count / sum(choice.count for choice in report.sparse)
    if share > budget:
        raise ValueError(
            f"dense_budget is {budget} but the smallest layer, {smallest.name!r}, has {share:.3f} of the weights: "
            "raise it to that at least, or use dense_unit='tiles'."
        )


def _check_parallel(model: nn.Module, report: SelectionReport) -> None:
    """Raise ``ValueError`` if tensor parallelism has spread a weight that it cannot be trained with."""
    for choice in report.sparse:
        weight = model.get_submodule(choice.name).weight
        assert isinstance(weight, Tensor)
        if weight.dim() > 2 and is_parallel(model, weight):
            raise ValueError(
                f"layer {choice.name!r} is a convolution whose weight tensor parallelism spreads, of which there is no "
                "masked one: leave its weight to FSDP2, or exclude the layer."
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
