"""The tuner: verifies and times the ways to compute a product, and chooses among those that are right."""

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from typing import NoReturn

import torch

from ..backends import BACKENDS, Backend
from .faults import DeviceFaultError, device_works, known_faults, record_fault
from .problem import MASKED, Choice, Problem
from .table import Decision, DispatchTable
from .trial import Trial
from .verify import Multiply, find_mismatch

LOG = logging.getLogger("sparsetrain")

Stopwatch = Callable[[Callable[[], object]], float]
"""Calls a function often enough and returns the median milliseconds of one call."""

MARGIN = 0.98
"""A sparse product is chosen if it takes at most this share of the dense one's time; measurements have noise."""


class Tuner:
    """Chooses the backend of every product in one environment.

    Args:
        table: Where decisions are found and recorded.
        environment: GPU, driver and versions: decisions of another environment do not count.
        stopwatch: How to time; None if nothing can be measured here, so that only recorded decisions are used.
        backends: Candidates by name, beside the dense product; None for all.
        runs: Verifications of every candidate, on fresh random data each.

    Example:
        >>> table = DispatchTable()
        >>> problem = Problem("forward", (64, 64), 64, torch.bfloat16)
        >>> table.record("some GPU", problem.key, Decision("cusparselt:7", {"masked": 2.0, "cusparselt:7": 1.0}))
        >>> str(Tuner(table, "some GPU").choose(problem, torch.device("cpu")))
        'cusparselt:7'
    """

    def __init__(
        self,
        table: DispatchTable,
        environment: str,
        *,
        stopwatch: Stopwatch | None = None,
        backends: Mapping[str, Backend] | None = None,
        runs: int = 5,
    ) -> None:
        self.table = table
        self.environment = environment
        self.backends = BACKENDS if backends is None else {**backends, MASKED.backend: BACKENDS[MASKED.backend]}
        self._stopwatch = stopwatch
        self._impossible: set[str] = set()
        self._runs = runs

    def choose(
        self, problem: Problem, device: torch.device, backend: str = "auto", deterministic: bool = False
    ) -> Choice:
        """Return the choice for a problem; benchmarks it if it has not been benchmarked.

        Args:
            problem: What is multiplied.
            device: Where.
            backend: ``"auto"``, or the only backend allowed.
            deterministic: Choose by name instead of time: the first verified algorithm of the first backend that runs.

        Raises:
            ValueError: If that backend cannot run here.
        """
        if backend != "auto" and (reason := self.backends[backend].why_not(device, problem.dtype, problem.matrix)):
            raise ValueError(f"backend is {backend!r} but {reason}")
        decision = self._decide(problem, device)
        if decision is None:
            return MASKED if backend == "auto" else Choice(backend)
        allowed = [Choice.parse(name) for name in decision.milliseconds]
        if backend == "auto":
            if deterministic:
                sparse = [choice for choice in allowed if choice != MASKED and choice.algorithm]
                return min(sparse or allowed or [decision.chosen], key=self._rank)
            return decision.chosen
        own = [choice for choice in allowed if choice.backend == backend]
        if not own:
            return decision.chosen if decision.chosen.backend == backend else self._refuse(backend, decision)
        pinned = [choice for choice in own if choice.algorithm] or own
        if deterministic:
            return min(pinned, key=self._rank)
        return min(own, key=lambda choice: decision.milliseconds[str(choice)])

    def _decide(self, problem: Problem, device: torch.device) -> Decision | None:
        """Return the recorded decision, or measure and record one; None if that is not possible."""
        decision = self.table.find(self.environment, problem.key)
        if decision is not None and decision.chosen.backend in self.backends:
            return decision
        if self._stopwatch is None or problem.key in self._impossible:
            return None
        try:
            decision = self.measure(problem, device)
        except torch.OutOfMemoryError:
            LOG.warning("%s cannot be measured for want of memory; it is computed densely in this run.", problem.key)
            self._impossible.add(problem.key)
            return None
        self.table.record(self.environment, problem.key, decision)
        LOG.info("%s: %s (%s)", problem.key, decision.choice, self.environment)
        return decision

    def measure(self, problem: Problem, device: torch.device) -> Decision:
        """Verify and time every candidate, and choose the fastest; the dense product unless another is clearly faster.

        Raises:
            RuntimeError: If this tuner has no stopwatch.
            torch.OutOfMemoryError: If the device has no room for the problem.
            DeviceFaultError: If an algorithm made the device unusable for this process; a new process leaves it out.
        """
        if self._stopwatch is None:
            raise RuntimeError("stopwatch is None: nothing can be measured here, so use recorded decisions.")
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(), torch.no_grad():
            trial = Trial(problem, device)
            milliseconds: dict[str, float] = {}
            denied: dict[str, str] = {}
            faults = known_faults(self.table, self.environment)
            for choice in self.candidates(problem, device, denied):
                if str(choice) in faults:
                    denied[str(choice)] = faults[str(choice)]
                    continue
                try:
                    multiply = trial.multiplier(self.backends[choice.backend], choice.algorithm)
                    reason = None if choice == MASKED else self._find_mismatch(trial, multiply)
                    if reason is None:
                        rows = trial.rows(1)
                        milliseconds[str(choice)] = self._stopwatch(functools.partial(multiply, rows))
                    else:
                        denied[str(choice)] = reason
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a candidate that fails, however it does, is a candidate less
                    denied[str(choice)] = _first_line(error)
                    if not device_works(device):
                        # what fails from here on, the dense product too, says nothing about itself
                        self._report_fault(choice, device, _first_line(error))
        best = min(milliseconds, key=lambda name: milliseconds[name], default=str(MASKED))
        dense_time = milliseconds.get(str(MASKED))
        if dense_time is not None and milliseconds[best] > MARGIN * dense_time:
            best = str(MASKED)
        return Decision(best, milliseconds, denied)

    def _find_mismatch(self, trial: Trial, multiply: Multiply) -> str | None:
        for run in range(self._runs):
            reason = find_mismatch(multiply, trial.dense, trial.matrix, trial.rows(run), trial.bias)
            if reason is not None:
                return reason
        return None

    def candidates(self, problem: Problem, device: torch.device, denied: dict[str, str] | None = None) -> list[Choice]:
        """Return every way that could compute a problem here, the dense product first.

        Args:
            problem: What is multiplied.
            device: Where.
            denied: Is given the backends that fail to tell their algorithms, with the reason.
        """
        found = [MASKED]
        for name, backend in self.backends.items():
            if name == MASKED.backend or backend.why_not(device, problem.dtype, problem.matrix) is not None:
                continue
            try:
                names = backend.algorithms(problem.matrix, problem.rows, problem.dtype, device)
            except Exception as error:
                if denied is not None:
                    denied[name] = _first_line(error)
                continue
            found += [Choice(name, algorithm) for algorithm in names]
        return found

    def _report_fault(self, choice: Choice, device: torch.device, reason: str) -> NoReturn:
        record_fault(self.table, self.environment, choice, reason)
        raise DeviceFaultError(
            f"{choice} made {device} unusable for this process ({reason}): start it again from its last checkpoint, "
            "which leaves this algorithm out."
        )

    def _rank(self, choice: Choice) -> tuple[int, int, str]:
        names = list(self.backends)
        place = names.index(choice.backend) if choice.backend in names else len(names)
        return place, len(choice.algorithm), choice.algorithm

    def _refuse(self, backend: str, decision: Decision) -> Choice:
        reasons = [f"{name}: {why}" for name, why in decision.denied.items() if Choice.parse(name).backend == backend]
        raise ValueError(
            f"backend is {backend!r} but no algorithm of it gave right numbers here "
            f"({'; '.join(reasons[:3]) or 'none was measured'}): use 'auto' or 'masked'."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
