"""Processes that set up a run together: what one refuses, all refuse, and what has to be equal is compared."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .equal_codes import Groups

Facts = Mapping[str, Any]
"""Name to what has to be equal: plain values, lists of them, and mappings from names to such."""

Note = Callable[[Callable[[], Facts]], None]
"""Takes what makes the facts; it is called only if there are others to compare with."""


@contextmanager
def together(groups: Groups, what: str, device: torch.device | None = None) -> Iterator[Note]:
    """Have all processes come out of a block without an error, with equal facts, or none; nothing is sent by one alone.

    The block may send nothing itself, as another process may not come to it.

    Args:
        groups: Over all of which, one after the other, is compared.
        what: Is set up, for messages.
        device: Of the messages, if groups want them on an accelerator.

    Raises:
        RuntimeError: If another process failed in the block; those that did raise their own errors.
        ValueError: If facts differ; it names the first of them, and the values of two processes.

    Example:
        >>> with together((), "the run") as note:
        ...     note(lambda: {"total_steps": 12})
    """
    noted: list[Callable[[], Facts]] = []
    if not groups:
        yield noted.append
        return
    rank = dist.get_rank()
    try:
        yield noted.append
        facts = {name: fact for make in noted for name, fact in make().items()}
    except Exception as error:
        with _on(device):
            _exchanged({rank: (str(error) or type(error).__name__, "")}, groups)
        raise
    with _on(device):
        found = _exchanged({rank: (None, hashlib.sha256(json.dumps(facts).encode()).hexdigest())}, groups)
        for other, (failure, _) in sorted(found.items()):
            if failure is not None:
                raise RuntimeError(f"rank {other} could not set up {what}: {failure}")
        if len({digest for _, digest in found.values()}) > 1:
            _refuse_difference(_exchanged({rank: facts}, groups), what)


def _on(device: torch.device | None) -> AbstractContextManager[Any]:
    # where torch puts messages of groups that have none on the host
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else nullcontext()


def _exchanged(own: dict[int, Any], groups: Groups) -> dict[int, Any]:
    """Return what all processes have, by their ranks."""
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, own, group=group)
        own = {rank: entry for part in parts for rank, entry in part.items()}
    return own


def _refuse_difference(facts: Mapping[int, Facts], what: str) -> None:
    first, *others = sorted(facts)
    for other in others:
        if difference := _difference(facts[first], facts[other]):
            name, one, two = difference
            raise ValueError(
                f"{name} is {one} on rank {first} but {two} on rank {other}: processes that train together must set up "
                f"{what} with the same values."
            )


def _difference(one: Any, other: Any, name: str = "") -> tuple[str, str, str] | None:
    """Return the name of the first difference, and both values in words; None if there is none."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            inside = f"{name}[{key!r}]" if name else str(key)
            if key not in one or key not in other:
                here, there = (_shown(part[key]) if key in part else "missing" for part in (one, other))
                return inside, here, there
            if found := _difference(one[key], other[key], inside):
                return found
        return (f"the order of {name}", _shown([*one]), _shown([*other])) if [*one] != [*other] else None
    return (name, _shown(one), _shown(other)) if one != other else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 64 else f"{text[:63]}…"


def anywhere(groups: Groups, flag: bool, device: torch.device | None = None) -> bool:
    """Return whether a flag is set in any process; all of them have to call this.

    Args:
        groups: Over all of which, one after the other, is asked.
        flag: Of this process.
        device: Of the messages, if groups want them on an accelerator.

    Example:
        >>> anywhere((), True)
        True
    """
    if not groups:
        return flag
    with _on(device):
        return any(_exchanged({dist.get_rank(): flag}, groups).values())


def device_of(model: Any) -> torch.device | None:
    """Return where a model is; None for what is none.

    Example:
        >>> device_of(nn.Linear(4, 4))
        device(type='cpu')
    """
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return None if first is None else first.device
