"""What users pass to a run, refused when it is given if it is of a wrong kind."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..backends import resolve_backend
from ..checks.rules import FLAG, TEXT, TOTAL_STEPS, Rule, either, instance, optional, require, sequence
from .selection.targets import as_list

MODULE = instance(nn.Module, "a torch.nn.Module")

OPTIMIZER = Rule(
    "a torch.optim.Optimizer",
    lambda value: isinstance(value, Optimizer) or isinstance(getattr(value, "optimizer", None), Optimizer),
)

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


def check_options(
    *, targets: Any, exclude: Any, backend: Any, total_steps: Any, logits_from: Any, teacher: Any, **flags: Any
) -> None:
    """Raise an error if an argument of a run or of a trainer's callback is of a wrong kind.

    Args:
        targets: As :class:`sparsetrain.SparseTraining` takes them.
        exclude: Likewise.
        backend: Likewise.
        total_steps: Likewise.
        logits_from: Likewise.
        teacher: Likewise.
        flags: True or False, each.

    Raises:
        TypeError: If targets or excludes are no strings.
        ValueError: If another value is not allowed.

    Example:
        >>> rest = {"targets": "mlp", "exclude": (), "total_steps": None, "logits_from": "", "teacher": None}
        >>> check_options(backend="cusparslt", **rest)
        Traceback (most recent call last):
            ...
        ValueError: backend is 'cusparslt': it must be one of [...] (did you mean 'cusparselt'?).
    """
    as_list("targets", targets)
    as_list("exclude", exclude)
    resolve_backend(backend)
    require("total_steps", total_steps, TOTAL_STEPS)
    require("logits_from", logits_from, TEXT)
    require("teacher", teacher, optional(MODULE))
    for name, value in flags.items():
        require(name, value, FLAG)
