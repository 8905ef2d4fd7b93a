"""``StepTimer``: the times of steps, and of mask searches and packing within them."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch

from sparsetrain.training import SparseTraining

from .measure import recorded_event


class StepTimer:
    """Marks ends of steps, and what happens within them, without waiting for the device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.spans: dict[str, list[tuple[Any, Any]]] = {}
        self._marks: list[Any] = []
        self._total = 0.0
        self._runs = False

    def __enter__(self) -> Self:
        """Start."""
        self._runs, self._marks = True, []
        self.mark()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, and wait for what was enqueued."""
        self._runs = False
        synchronize(self.device)

    def watch(self, training: SparseTraining) -> None:
        """Time the parts of a run's steps."""
        self.spans = {"refresh": [], "repack": []}
        training.timer = self

    @contextmanager
    def part(self, name: Literal["refresh", "repack"]) -> Iterator[None]:
        """Put marks around a part of a step."""
        start = self._now()
        yield
        if self._runs:
            self.spans[name].append((start, self._now()))

    def mark(self) -> None:
        """Mark the end of a step."""
        self._marks.append(self._now())

    def steps(self) -> list[float]:
        """Return the milliseconds between the marks since the start."""
        found = [self._between(*pair) for pair in itertools.pairwise(self._marks)]
        self._total += sum(found)
        return found

    def shares(self) -> dict[str, float]:
        """Return the share of all timed steps that each part took."""
        return {part: sum(self._between(*span) for span in spans) / self._total for part, spans in self.spans.items()}

    def _now(self) -> Any:
        return recorded_event() if self.device == "cuda" else time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) if self.device == "cuda" else 1e3 * (end - start))


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
