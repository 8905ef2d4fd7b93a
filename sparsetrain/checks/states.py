"""What a saved state may hold: rules for tensors and layers, and one sentence for a state that breaks one.

Every part of a run has checks of such rules, so that all of a state is looked at before any of it is loaded.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, NoReturn

import torch
from torch import Tensor

from .rules import Rule, each, mapping, sequence
from .tensors import why_not_plain


def require_state(key: str, value: Any, rule: Rule) -> None:
    """Raise ``ValueError`` unless what a state holds under a key follows a rule.

    Example:
        >>> from .rules import whole
        >>> require_state("clock", 3, whole())
    """
    _require(f"state[{key!r}]", value, rule)


def require_part(name: str, value: Any, rule: Rule) -> None:
    """Raise ``ValueError`` unless what a state holds of a modifier follows a rule.

    Example:
        >>> from .rules import whole
        >>> require_part("decay", 3, whole())
    """
    _require(f"state['modifiers'][{name!r}]", value, rule)


def refuse_missing(name: str) -> NoReturn:
    """Raise ``ValueError`` for a state without what a modifier of its method needs.

    Raises:
        ValueError: Always.
    """
    refuse(f"state['modifiers'] has no {name!r} but the method needs it")


def require_keys(state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise ``ValueError`` unless a state has these keys.

    Example:
        >>> require_keys({"clock": 3}, ["clock"])
    """
    if missing := sorted(set(keys) - set(state)):
        raise ValueError(f"state has no {missing[0]!r}: it must be what SparseTraining.state_dict() returned.")


def refuse(complaint: str) -> NoReturn:
    """Raise ``ValueError`` for a state that no run can have written.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{complaint}; the checkpoint is damaged.")


def tensor(dtype: torch.dtype | None, shape: Sequence[int] | None, finite: bool = False) -> Rule:
    """Allow a plain tensor.

    Args:
        dtype: Its dtype; None for any floating-point one.
        shape: Its shape; None for any.
        finite: Neither infinite nor not a number anywhere.

    Example:
        >>> tensor(torch.int16, (2, 2)).complaint("codes", None)
        'codes is None: it must be a torch.int16 tensor (2, 2)'
    """

    def accepts(value: Any) -> bool:
        if why_not_plain(value) is not None:
            return False
        right = value.is_floating_point() if dtype is None else value.dtype == dtype
        return right and (shape is None or tuple(value.shape) == tuple(shape))

    def inside(name: str, value: Tensor) -> Iterator[str]:
        if finite and not bool(value.isfinite().all()):
            yield f"{name} has entries that are not finite"

    kind = "floating-point" if dtype is None else str(dtype)
    return Rule(f"a {kind} tensor{'' if shape is None else f' {tuple(shape)}'}", accepts, inside)


def by_layer(rules: Mapping[str, Rule], needed: Collection[str] | None = ()) -> Rule:
    """Allow a mapping of layers' names.

    Args:
        rules: Layer name to rule.
        needed: Layers that must be there; None for all.

    Example:
        >>> from .rules import whole
        >>> by_layer({"fc": whole()}).complaint("state['soft_scales']", {"fx": 1})
        "state['soft_scales'] has 'fx', which is no sparse layer of it"
    """
    return mapping(rules, needed, of="sparse layer")


def names_of(layers: Collection[str]) -> Rule:
    """Allow a list of different layers' names.

    Example:
        >>> names_of(["a", "b"]).complaint("state['active']", ["c"])
        "state['active'][0] is 'c': it must be a sparse layer's name"
    """
    known = set(layers)
    return sequence(Rule("a sparse layer's name", lambda value: isinstance(value, str) and value in known), unique=True)


def is_plain(value: Any) -> bool:
    """Say whether a value is made of numbers, strings, booleans, None, lists and mappings alone.

    Example:
        >>> is_plain({"phases": [1, None]}), is_plain({"phases": object()})
        (True, False)
    """
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | float | str) or _is_small(value)


PLAIN = Rule("a dict of numbers, strings and lists", lambda value: isinstance(value, Mapping) and is_plain(value))


def like(template: Any) -> Rule:
    """Allow what has a template's keys, lengths and types all the way down; of tensors, dtypes and shapes too.

    Example:
        >>> like({"last_epoch": 0, "_last_lr": [0.1]}).complaint("scheduler", {"last_epoch": None, "_last_lr": [0.2]})
        "scheduler['last_epoch'] is None: it must be an int, as in 0"
    """
    if isinstance(template, Tensor):
        return tensor(template.dtype, template.shape)
    if isinstance(template, Mapping):
        if all(isinstance(key, str) for key in template):
            return mapping({key: like(entry) for key, entry in template.items()})
        return Rule(
            "a dict of ints", lambda value: isinstance(value, Mapping) and all(map(_is_small, sum(value.items(), ())))
        )
    if isinstance(template, list | tuple):
        return each([like(entry) for entry in template])
    if isinstance(template, float):
        return Rule("a float", lambda value: isinstance(value, float) and isfinite(value) >= isfinite(template))
    if isinstance(template, int) and not isinstance(template, bool):
        return Rule(f"an int, as in {template}", _is_small)
    return Rule(f"a {type(template).__name__}", lambda value: type(value) is type(template))


def _is_small(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64


def _require(path: str, value: Any, rule: Rule) -> None:
    if complaint := rule.complaint(path, value):
        refuse(complaint)
