"""Where canaries are kept."""

from collections.abc import Callable
from typing import NamedTuple


class Canary(NamedTuple):
    """What is tried, and what a failure says: torch's behaviour, where to look, what depends on it."""

    check: Callable[[], None]
    behaviour: str
    look: str
    breaks: str


CANARIES: dict[str, Canary] = {}


def canary(name: str, behaviour: str, look: str, breaks: str) -> Callable[[Callable[[], None]], None]:
    def keep(check: Callable[[], None]) -> None:
        CANARIES[name] = Canary(check, behaviour, look, breaks)

    return keep
