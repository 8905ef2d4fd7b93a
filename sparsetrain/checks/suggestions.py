"""What a mistyped word was meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known words that are most like a word, the best first.

    Args:
        word: What was given; what is no string is like nothing.
        known: What is allowed.
        count: At most so many.
        cutoff: How alike they must be, from 0 to 1.

    Example:
        >>> nearest("warmpu", ["decay", "warmup"])
        ['warmup']
    """
    if not isinstance(word, str):
        return []
    spelled = {name.lower(): name for name in known}
    return [spelled[name] for name in difflib.get_close_matches(word.lower(), spelled, count, cutoff)]


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return the part of a sentence that asks for the nearest known word; empty if none is near.

    Example:
        >>> "preset is 'fts'" + did_you_mean("fts", ["fst", "step"])
        "preset is 'fts' (did you mean 'fst'?)"
    """
    return "".join(f" (did you mean {name!r}?)" for name in nearest(word, known))
