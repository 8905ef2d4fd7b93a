"""What values are allowed, as rules: of arguments when they are given, and of a saved state before it is loaded."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .suggestions import did_you_mean


@dataclass(frozen=True)
class Rule:
    """What a value may be.

    Args:
        allowed: In words, after "it must be".
        accepts: Whether a value is of that kind.
        inside: Name and value to what is wrong with the parts of a value of that kind; None if it has none.
        hint: Value to what is said after the words.

    Example:
        >>> whole(1).complaint("steps", 0)
        'steps is 0: it must be an int of at least 1'
    """

    allowed: str
    accepts: Callable[[Any], bool]
    inside: Callable[[str, Any], Iterable[str]] | None = None
    hint: Callable[[Any], str] | None = None

    def complaint(self, name: str, value: Any) -> str | None:
        """Return what is wrong with a value, as a sentence without its end; None if nothing is."""
        if not self.accepts(value):
            hint = "" if self.hint is None else self.hint(value)
            return f"{name} is {shown(value)}: it must be {self.allowed}{hint}"
        return None if self.inside is None else next(iter(self.inside(name, value)), None)


def require(name: str, value: Any, rule: Rule) -> None:
    """Raise ``ValueError`` unless a value follows a rule.

    Example:
        >>> require("deterministic", True, FLAG)
    """
    if complaint := rule.complaint(name, value):
        raise ValueError(f"{complaint}.")


def shown(value: Any) -> str:
    """Return a value in a few words.

    Example:
        >>> shown([1, 2]), shown([[1], [2]]), shown("x" * 99) == "'" + "x" * 62 + "…"
        ('[1, 2]', 'a list of 2', True)
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(type(value), "dtype") and hasattr(type(value), "shape"):
        shape = "" if getattr(value, "is_nested", False) else f" {tuple(value.shape)}"
        return f"a {type(value).__name__} of {value.dtype}{shape}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, Mapping | list | tuple | set) and not _is_short(value):
        return f"a {type(value).__name__} of {len(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 64 else f"{text[:63]}…"


def _is_short(value: Any) -> bool:
    return (
        len(value) <= 8
        and all(isinstance(entry, int | float | str | None) for entry in value)
        and not (isinstance(value, Mapping) and value)
    )


FLAG = Rule("True or False", lambda value: isinstance(value, bool))

INT = Rule("an int", lambda value: isinstance(value, int) and not isinstance(value, bool))

TEXT = Rule("a string", lambda value: isinstance(value, str))


DICT = Rule("a dict", lambda value: isinstance(value, Mapping))

EMPTY = Rule("empty", lambda value: isinstance(value, Mapping) and not value)

NONE = Rule("None", lambda value: value is None)


LARGEST = 2**62
"""Of ints without another limit, so that they fit into counters of 64 bits."""


def whole(least: int = 0, most: int | None = None, of: str = "") -> Rule:
    """Allow an int in a range; True and False are none.

    Args:
        least: The smallest.
        most: The largest; None for 2^62, which goes without saying.
        of: What is counted, for the words.

    Example:
        >>> whole().accepts(True), whole().accepts(3)
        (False, True)
    """
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def fits(value: Any) -> bool:
        return INT.accepts(value) and least <= value <= (LARGEST if most is None else most)

    return Rule(f"an int {limits}{of and f' ({of})'}", fits)


TOTAL_STEPS = Rule(
    "a positive int (optimizer steps), or None for schedules in steps",
    lambda value: value is None or whole(1).accepts(value),
)


def number(allowed: str, fits: Callable[[float], bool] = lambda value: True) -> Rule:
    """Allow an int or a float that is finite.

    Args:
        allowed: In words.
        fits: Whether a finite number is allowed.

    Example:
        >>> rule = number("a finite number of at least 0", lambda value: value >= 0)
        >>> rule.accepts(float("nan")), rule.accepts(True), rule.accepts(0.5)
        (False, False, True)
    """

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # an int may be too large for a float
        finite = value.bit_length() < 1024 if isinstance(value, int) else math.isfinite(value)
        return finite and fits(value)

    return Rule(allowed, accepts)


FINITE = number("a finite number")

NOT_NEGATIVE = number("a finite number of at least 0", lambda value: value >= 0)


def one_of(words: Iterable[str], others: str = "", allowed: str = "") -> Rule:
    """Allow some words; a complaint names the nearest.

    Args:
        words: In the order in which they are shown.
        others: What else is allowed, for the words.
        allowed: All of it in words; made from the rest if it is empty.

    Example:
        >>> one_of(["red", "green"]).complaint("colour", "gren")
        "colour is 'gren': it must be one of ['red', 'green'] (did you mean 'green'?)"
    """
    known = list(words)
    return Rule(
        allowed or f"one of {known}{others}",
        lambda value: isinstance(value, str) and value in known,
        hint=lambda value: did_you_mean(value, known),
    )


def instance(kind: type | tuple[type, ...], allowed: str) -> Rule:
    """Allow objects of a class.

    Example:
        >>> instance(dict, "a dict").complaint("method", 3)
        'method is 3: it must be a dict'
    """
    return Rule(allowed, lambda value: isinstance(value, kind))


def either(first: Rule, *others: Rule, allowed: str = "") -> Rule:
    """Allow what one of the rules allows; a value is checked by the first that accepts its kind.

    Example:
        >>> either(TEXT, whole()).complaint("size", -1)
        'size is -1: it must be a string or an int of at least 0'
    """
    rules = (first, *others)

    def inside(name: str, value: Any) -> Iterator[str]:
        rule = next(rule for rule in rules if rule.accepts(value))
        if complaint := rule.complaint(name, value):
            yield complaint

    return Rule(
        allowed or " or ".join(rule.allowed for rule in rules),
        lambda value: any(rule.accepts(value) for rule in rules),
        inside,
        lambda value: "".join(rule.hint(value) for rule in rules if rule.hint is not None),
    )


def optional(rule: Rule) -> Rule:
    """Allow None as well.

    Example:
        >>> optional(TEXT).complaint("name", None) is None
        True
    """
    return replace(either(NONE, rule), allowed=f"{rule.allowed}, or None")


def sequence(rule: Rule, length: int | None = None, least: int = 0, unique: bool = False, allowed: str = "") -> Rule:
    """Allow a list or tuple whose entries follow a rule.

    Args:
        rule: Of every entry.
        length: How many there must be; None for any number.
        least: How many there must be at least.
        unique: No two are equal.
        allowed: In words; made from the rest if it is empty.

    Example:
        >>> sequence(whole()).complaint("starts", [0, None])
        'starts[1] is None: it must be an int of at least 0'
    """

    def inside(name: str, value: Any) -> Iterator[str]:
        for index, entry in enumerate(value):
            if complaint := rule.complaint(f"{name}[{index}]", entry):
                yield complaint
        if unique and len(set(value)) < len(value):
            yield f"{name} is {list(value)}: its entries must differ"

    count = "" if length is None else f"{length} "
    return Rule(
        allowed or f"a list of {count}{'entries' if rule.inside else f'entries, each {rule.allowed}'}",
        lambda value: isinstance(value, list | tuple) and length in (None, len(value)) and len(value) >= least,
        inside,
    )


def each(rules: Sequence[Rule]) -> Rule:
    """Allow a list or tuple with one entry for each rule.

    Example:
        >>> each([TEXT, FLAG]).complaint("pair", ["a", "b"])
        "pair[1] is 'b': it must be True or False"
    """

    def inside(name: str, value: Any) -> Iterator[str]:
        for index, (rule, entry) in enumerate(zip(rules, value, strict=True)):
            if complaint := rule.complaint(f"{name}[{index}]", entry):
                yield complaint

    count = len(rules)
    return Rule(f"a list of {count}", lambda value: isinstance(value, list | tuple) and len(value) == count, inside)


def mapping(
    rules: Mapping[str, Rule], needed: Collection[str] | None = None, of: str = "", others: bool = False
) -> Rule:
    """Allow a mapping whose values follow the rules of their keys.

    Args:
        rules: Key to rule.
        needed: Keys that must be there; None for all.
        of: What the keys are, for the words.
        others: Other keys are allowed.

    Example:
        >>> rule = mapping({"value": NOT_NEGATIVE})
        >>> rule.complaint("decay", {"value": -1.0})
        "decay['value'] is -1.0: it must be a finite number of at least 0"
        >>> rule.complaint("decay", {})
        "decay has no 'value'"
    """

    def inside(name: str, value: Any) -> Iterator[str]:
        for key in rules if needed is None else needed:
            if key not in value:
                yield f"{name} has no {key!r}"
        for key, entry in value.items():
            if key not in rules:
                if not others:
                    yield f"{name} has {shown(key)}, which is no {of or 'key'} of it"
            elif complaint := rules[key].complaint(f"{name}[{key!r}]", entry):
                yield complaint

    return Rule("a dict", lambda value: isinstance(value, Mapping), inside)
