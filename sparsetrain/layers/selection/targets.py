"""What the entries of ``targets`` and ``exclude`` match: groups, names, submodules, globs and regular expressions."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ...checks.suggestions import nearest
from .feed_forward import feed_forward
from .layer_classes import GROUPS
from .surroundings import Surroundings

KINDS = (
    "'all-linear', 'all-conv', 'mlp', the name of a layer or of a submodule or the end of one, a glob, or a regular "
    "expression"
)
"""What an entry may be, for messages."""


Reading: TypeAlias = Callable[[str, str], bool]
"""Whether an entry, in one of the ways to read it, matches a name."""


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


READINGS: tuple[Reading, ...] = (
    lambda entry, name: name == entry or name.endswith("." + entry),
    lambda entry, name: any(fnmatch.fnmatchcase(end, entry) for end in _ends(name)),
    lambda entry, name: re.fullmatch(entry, name) is not None,
)
"""Ways to read an entry that is no group, the first to be tried at the front."""


@dataclass(frozen=True)
class Match:
    """What an entry matches.

    Args:
        names: The layers.
        kind: ``"group"``, ``"name"`` (of the layers themselves), or ``"several"``, as a submodule or a pattern stands
            for.
    """

    names: frozenset[str]
    kind: str


def as_list(argument: str, value: str | Sequence[str]) -> list[str]:
    """Return targets or excludes as a list of strings.

    Args:
        argument: ``"targets"`` or ``"exclude"``, for messages.
        value: What the user passed.

    Raises:
        TypeError: If it is neither a string nor a list of strings.
        ValueError: If an entry is empty, or all targets are.

    Example:
        >>> as_list("targets", "mlp")
        ['mlp']
    """
    if isinstance(value, bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{argument} is {value!r}: it must be a string or a list of strings.")
    entries = [value] if isinstance(value, str) else list(value)
    if argument == "targets" and not entries:
        raise ValueError(f"targets is empty: pass {KINDS}.")
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{argument} holds {entry!r}: its entries must be strings, so pass names of layers.")
        if not entry:
            raise ValueError(f"{argument} holds an empty string: pass {KINDS}.")
    return entries


def match(entry: str, surroundings: Surroundings, argument: str = "targets") -> Match:
    """Find what an entry means; of its possible readings, the first that matches anything.

    Args:
        entry: A group, else tried as a name, as a glob and as a regular expression, each on the names of layers
            and then on those of submodules.
        surroundings: The model.
        argument: ``"targets"`` or ``"exclude"``, for messages.

    Returns:
        The layers, stacked experts included; none if nothing matches.

    Raises:
        ValueError: If nothing but a regular expression is left, and it is none.

    Example:
        >>> from torch import nn
        >>> encoder = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> model = nn.ModuleDict({"encoder": encoder, "decoder": nn.Linear(4, 4)})
        >>> sorted(match("encoder", Surroundings(model)).names)
        ['encoder.0', 'encoder.1']
    """
    if entry in GROUPS or entry == "mlp":
        return Match(_group(entry, surroundings), "group")
    candidates = [*surroundings.layers, *surroundings.experts]
    submodules = [name for name in surroundings.modules if name and name not in surroundings.layers]
    for place, reads in enumerate(READINGS):
        try:
            layers = {name for name in candidates if _either(reads, entry, surroundings, name)}
            if layers:
                return Match(frozenset(layers), "several" if place else "name")
            above = tuple(name + "." for name in submodules if _either(reads, entry, surroundings, name))
        except re.error as error:
            raise ValueError(
                f"{argument}: {entry!r} matches no name and is no regular expression ({error}): pass {KINDS}."
            ) from None
        layers = {name for name in candidates if name.startswith(above)}
        if layers:
            return Match(frozenset(layers), "several")
    return Match(frozenset(), "several")


def _group(entry: str, surroundings: Surroundings) -> frozenset[str]:
    if entry == "mlp":
        return frozenset(feed_forward(surroundings))
    found = {name for name, layer in surroundings.layers.items() if isinstance(layer, GROUPS[entry])}
    return frozenset(found | set(surroundings.experts if entry == "all-linear" else ()))


def _either(reads: Reading, entry: str, surroundings: Surroundings, name: str) -> bool:
    plain = surroundings.plain[name]
    return reads(entry, name) or (bool(plain) and reads(entry, plain))


def no_match(target: str, surroundings: Surroundings) -> str:
    """Return what to say of a target that matches nothing."""
    names = [surroundings.plain[name] or name for name in (*surroundings.layers, *surroundings.experts)]
    if not names:
        return f"targets: {target!r} matches nothing, because the model has no linear or convolutional layer."
    above = {surroundings.plain[name] for name in surroundings.modules if name} - set(names)
    known = dict.fromkeys([*names, *above, *(name.rpartition(".")[2] for name in (*names, *above))])
    close = nearest(target, known, count=3, cutoff=0.5)
    shown = ", ".join(map(repr, close or names[:5])) + ("" if close or len(names) <= 5 else ", …")
    return f"targets: {target!r} matches no layer; allowed are {KINDS}, and the model has {shown}."
