"""What is not proven on sharded weights yet, one entry each: an entry that is taken out is allowed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..criteria import resolve_criterion
from ..distributed.peers import is_gathered, is_parallel
from ..distributed.shards import first_cut, is_spread
from ..layers.sharded.alignment import parallel_too_late
from ..layers.sharded.refusals import require_one_run
from ..modifiers.base import Setup

Layers = Mapping[str, nn.Module]


class Unproven(NamedTuple):
    """Something that runs in one process have and runs on shards do not.

    Args:
        what: Name and value, from a run's setup.
        asks: Whether a run wants it, given its setup and layers.
        why: It is not allowed, and the remedy.
    """

    what: Callable[[Setup], str]
    asks: Callable[[Setup, Layers], bool]
    why: str


def _gathers_columns(setup: Setup, layers: Layers) -> bool:
    weights: list[Any] = [layer.weight for layer in layers.values()]
    return is_gathered(setup.model) and any(first_cut(weight) == 1 for weight in weights)


def _criterion(setup: Setup) -> Any:
    return resolve_criterion(setup.method.criterion)


UNPROVEN: tuple[Unproven, ...] = (
    Unproven(
        lambda setup: f"distillation is {setup.method.distillation} and teacher is None",
        lambda setup, layers: bool(setup.method.distillation) and setup.teacher is None and is_gathered(setup.model),
        "what FSDP2 manages cannot be copied: pass a teacher",
    ),
    Unproven(
        lambda setup: f"criterion is {_criterion(setup).name!r}",
        lambda setup, layers: "input" in _criterion(setup).needs and _gathers_columns(setup, layers),
        "weights are cut by columns, of whose inputs each process sees all: cut rows, or use 'magnitude'",
    ),
)


def check_shards(setup: Setup, layers: Layers) -> None:
    """Raise ``ValueError`` if a run on sharded weights cannot be set up in this way.

    Args:
        setup: What it is to be made of.
        layers: That are to become sparse, by name.

    Example:
        >>> from sparsetrain.methods import fst
        >>> model, method = nn.Sequential(nn.Linear(8, 4)), fst()
        >>> check_shards(Setup(model, method, method.schedule.resolve(12), []), {"0": model[0]})
    """
    require_one_run(setup.model, layers)
    if not any(is_spread(layer.weight) for layer in layers.values()):
        return
    for entry in UNPROVEN:
        if entry.asks(setup, layers):
            raise ValueError(f"{entry.what(setup)} but weights are sharded, and {entry.why}.")


def check_late_shards(setup: Setup, layers: Layers) -> None:
    """Raise ``ValueError`` if a run that is under way cannot go on with layers that were sharded since it was made.

    Args:
        setup: What it was made of.
        layers: That are sparse, by name.

    Example:
        >>> from sparsetrain.methods import fst
        >>> model, method = nn.Sequential(nn.Linear(8, 4)), fst()
        >>> check_late_shards(Setup(model, method, method.schedule.resolve(12), []), {"0": model[0]})
    """
    for name, layer in layers.items():
        if is_parallel(setup.model, layer.weight):  # type: ignore[arg-type]
            raise ValueError(parallel_too_late(name))
    check_shards(setup, layers)
