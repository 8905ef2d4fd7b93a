"""The table of decisions: what was measured for which problem in which environment, as JSON in the user's cache."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: two writers at once may lose a decision, which is measured again
    fcntl = None  # type: ignore[assignment]

from .problem import Choice

VERSION = 1
LOG = logging.getLogger("sparsetrain")


@dataclass(frozen=True)
class Decision:
    """What was measured for a problem, and what was chosen.

    Args:
        choice: Its backend and algorithm.
        milliseconds: Median time of every candidate whose numbers were right.
        denied: Candidates that must not be used, with the reason.

    Example:
        >>> Decision("cusparselt:7", {"masked": 1.5, "cusparselt:7": 1.0}).speedup
        1.5
    """

    choice: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    denied: Mapping[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> Choice:
        """The choice."""
        return Choice.parse(self.choice)

    @property
    def speedup(self) -> float | None:
        """Time of the dense product over that of the choice; None if it was not measured."""
        dense, mine = self.milliseconds.get("masked"), self.milliseconds.get(self.choice)
        return dense / mine if dense and mine else None

    @classmethod
    def from_json(cls, entry: Any) -> "Decision":
        """Return the decision that an entry of a table's file holds.

        Raises:
            ValueError: If it is none.
        """
        if not isinstance(entry, dict) or not isinstance(entry.get("choice"), str):
            raise ValueError(f"entry is {entry!r}: it must be an object with a 'choice'.")
        milliseconds, denied = entry.get("milliseconds", {}), entry.get("denied", {})
        if not isinstance(milliseconds, dict) or not all(isinstance(ms, int | float) for ms in milliseconds.values()):
            raise ValueError(f"milliseconds is {milliseconds!r}: it must be an object of numbers.")
        if not isinstance(denied, dict):
            raise ValueError(f"denied is {denied!r}: it must be an object of reasons.")
        return cls(entry["choice"], milliseconds, denied)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing unlocks


class DispatchTable:
    """Decisions by environment and problem, kept in memory and, with a path, in a file that processes share.

    Args:
        path: A JSON file, made when the first decision is recorded; None keeps decisions in memory.

    Example:
        >>> table = DispatchTable()
        >>> table.record("H200", "forward 64x64 bfloat16 64 tokens", Decision("masked"))
        >>> table.find("H200", "forward 64x64 bfloat16 64 tokens").choice
        'masked'
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._entries = self._read()

    def find(self, environment: str, problem: str) -> Decision | None:
        """Return what is known of a problem."""
        return self._entries.get(f"{environment} | {problem}")

    def record(self, environment: str, problem: str, decision: Decision) -> None:
        """Add a decision, and write the file; a file that cannot be written is warned of, not an error."""
        self._entries[f"{environment} | {problem}"] = decision
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self._entries = {**self._read(), **self._entries}  # others may have written meanwhile
                self._write(self.path)
        except OSError as error:
            LOG.warning(
                "the dispatch table %s cannot be written (%s); decisions last as long as the process.", self.path, error
            )

    def _write(self, path: Path) -> None:
        entries = {key: asdict(entry) for key, entry in sorted(self._entries.items())}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            try:
                file.write(json.dumps({"version": VERSION, "entries": entries}, indent=1))
                file.close()
                os.replace(file.name, path)  # readers see the old file or the new one
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise

    def entries(self) -> dict[str, Decision]:
        """Return every decision by ``"environment | problem"``."""
        return dict(self._entries)

    def _read(self) -> dict[str, Decision]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text())
            if content["version"] != VERSION:
                raise ValueError(f"version is {content['version']!r}: it must be {VERSION}.")
            return {key: Decision.from_json(entry) for key, entry in content["entries"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            LOG.warning("the dispatch table %s is ignored and measured again: %s", self.path, error)
            return {}
