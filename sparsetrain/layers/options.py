"""What users pass to a run, refused when it is given if it is of a wrong kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ..backends import resolve_backend
from ..checks.rules import FLAG, TEXT, TOTAL_STEPS, Rule, either, instance, one_of, optional, require, sequence
from .selection.targets import as_list

MODULE = instance(nn.Module, "a torch.nn.Module")

OPTIMIZER = Rule(
    "a torch.optim.Optimizer",
    lambda value: isinstance(value, Optimizer) or isinstance(getattr(value, "optimizer", None), Optimizer),
)

GROUP = instance(ProcessGroup, "a torch.distributed.ProcessGroup")

SCHEDULER = Rule(
    "a learning-rate scheduler",
    lambda value: all(callable(getattr(value, name, None)) for name in ("step", "state_dict", "load_state_dict")),
)


def check_owners(model: Any, optimizer: Any, lr_schedulers: Any) -> None:
    """Raise ``ValueError`` unless these are a model, its optimizers and their learning-rate schedulers.

    Args:
        model: A module.
        optimizer: One, or a list of them.
        lr_schedulers: A list.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> check_owners(model, model.parameters(), [])
        Traceback (most recent call last):
            ...
        ValueError: optimizer is <generator object ...>: it must be a torch.optim.Optimizer or a list of them.
    """
    require("model", model, MODULE)
    require("optimizer", optimizer, either(OPTIMIZER, sequence(OPTIMIZER, allowed="a list of them")))
    require("lr_schedulers", lr_schedulers, sequence(SCHEDULER, allowed="a list of learning-rate schedulers"))


@dataclass(frozen=True)
class LayerOptions:
    """Which layers become sparse and how their products run, as :class:`sparsetrain.SparseTraining` takes it.

    Args:
        targets: As in :func:`sparsetrain.select_layers`.
        exclude: Likewise.
        backend: As in :func:`sparsetrain.sparsify_`, like the two that follow.
        deterministic: One verified algorithm a layer by name.
        keep_transposed: Keep Wᵀ packed between steps.

    Raises:
        TypeError: If targets or excludes are no strings.
        ValueError: If another value is not allowed.

    Example:
        >>> LayerOptions("mlp", backend="cusparslt")
        Traceback (most recent call last):
            ...
        ValueError: backend is 'cusparslt': it must be one of [...] (did you mean 'cusparselt'?).
    """

    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    backend: str = "auto"
    deterministic: bool = False
    keep_transposed: bool = True

    def __post_init__(self) -> None:
        as_list("targets", self.targets)
        as_list("exclude", self.exclude)
        resolve_backend(self.backend)
        for name in ("deterministic", "keep_transposed"):
            require(name, getattr(self, name), FLAG)


def check_run_options(
    *, total_steps: Any, logits_from: Any, teacher: Any, gather: Any = "auto", group: Any = None, **flags: Any
) -> None:
    """Raise ``ValueError`` if an argument of a run or of a trainer's callback is of a wrong kind.

    Args:
        total_steps: As :class:`sparsetrain.SparseTraining` takes them.
        logits_from: Likewise.
        teacher: Likewise.
        gather: Likewise.
        group: Likewise.
        flags: True or False, each.
    """
    require("total_steps", total_steps, TOTAL_STEPS)
    require("logits_from", logits_from, TEXT)
    require("teacher", teacher, optional(MODULE))
    require("group", group, optional(GROUP))
    require("gather", gather, one_of(("auto", "masked", "packed")))
    for name, value in flags.items():
        require(name, value, FLAG)


def check_options(
    *,
    targets: Any,
    exclude: Any,
    backend: Any,
    deterministic: Any,
    keep_transposed: Any,
    total_steps: Any,
    logits_from: Any,
    teacher: Any,
    **flags: Any,
) -> None:
    """Do both for a trainer's callback."""
    LayerOptions(targets, exclude, backend, deterministic, keep_transposed)
    check_run_options(total_steps=total_steps, logits_from=logits_from, teacher=teacher, **flags)
