"""The tuner: verifies and times the ways to compute a product, and chooses among those that are right."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..backends import BACKENDS, Backend, Operand
from ..backends.filling import Filling, fill_
from ..kernels.mask_search.operator import search_tiles
from ..kernels.tile_codes.reference import unpack_codes
from .problem import MASKED, Choice, Problem
from .table import Decision, DispatchTable
from .verify import what_is_wrong

LOG = logging.getLogger("sparsetrain")

Stopwatch = Callable[[Callable[[], object]], float]
"""Calls a function often enough and returns the median milliseconds of one call."""

MARGIN = 0.98
"""A sparse product is chosen if it takes at most this share of the dense one's time; measurements have noise."""


class Tuner:
    """Chooses who computes a product in one environment.

    Args:
        table: Where decisions are found and recorded.
        environment: GPU, driver and versions: decisions of another environment do not count.
        stopwatch: How to time; None if nothing can be measured here, so that only recorded decisions are used.
        backends: Candidates by name; None for all.
        runs: Verifications of every candidate, on fresh random data each.

    Example:
        >>> table = DispatchTable()
        >>> problem = Problem("forward", (64, 64), 64, torch.bfloat16)
        >>> table.record("some GPU", problem.key, Decision("cusparselt:7", {"masked": 2.0, "cusparselt:7": 1.0}))
        >>> str(Tuner(table, "some GPU").choose(problem, torch.device("cpu")))
        'cusparselt:7'
    """

    def __init__(
        self, table: DispatchTable, environment: str, *, stopwatch: Stopwatch | None = None,
        backends: Mapping[str, Backend] | None = None, runs: int = 5,
    ) -> None:  # fmt: skip
        self.table = table
        self.environment = environment
        self.backends = BACKENDS if backends is None else backends
        self._stopwatch = stopwatch
        self._runs = runs

    def choose(
        self, problem: Problem, device: torch.device, backend: str = "auto", deterministic: bool = False
    ) -> Choice:
        """Return who computes a problem; measures it if it has not been measured.

        Args:
            problem: What is multiplied.
            device: Where.
            backend: ``"auto"``, or the only backend allowed.
            deterministic: Choose by name instead of time: the first verified candidate of the first backend that runs.

        Raises:
            ValueError: If that backend cannot run here.
        """
        if backend != "auto" and (reason := self.backends[backend].why_not(device, problem.dtype, problem.shape)):
            raise ValueError(f"backend is {backend!r} but {reason}")
        decision = self.table.find(self.environment, problem.key)
        if decision is None:
            if self._stopwatch is None:
                return MASKED if backend == "auto" else Choice(backend)
            decision = self.measure(problem, device)
            self.table.record(self.environment, problem.key, decision)
            LOG.info("%s: %s (%s)", problem.key, decision.choice, self.environment)
        allowed = [Choice.parse(name) for name in decision.milliseconds]
        if backend != "auto":
            allowed = [choice for choice in allowed if choice.backend == backend]
        elif not deterministic:
            return decision.chosen
        if not allowed:
            # a recorded choice without times, or a backend that gave no right number
            return decision.chosen if backend in ("auto", decision.chosen.backend) else self._refuse(backend, decision)
        if deterministic:
            sparse = [choice for choice in allowed if choice != MASKED]
            return min(sparse or [MASKED], key=self._rank)
        return min(allowed, key=lambda choice: decision.milliseconds[str(choice)])

    def measure(self, problem: Problem, device: torch.device) -> Decision:
        """Verify and time every candidate, and choose the fastest; the dense product unless another is clearly faster.

        Raises:
            RuntimeError: If this tuner has no stopwatch.
        """
        if self._stopwatch is None:
            raise RuntimeError("stopwatch is None: nothing can be measured here, so use recorded decisions.")
        weight = torch.randn(problem.matrix, device=device)
        codes = search_tiles(weight, True)
        matrix = weight.to(problem.dtype).masked_fill_(~unpack_codes(codes), 0)
        bias = torch.randn(problem.matrix[0], device=device, dtype=problem.dtype) if problem.bias else None
        samples = [torch.randn(problem.rows, problem.matrix[1], device=device, dtype=problem.dtype) for _ in range(2)]

        def dense(rows: Tensor) -> Tensor:
            return torch.nn.functional.linear(rows, matrix, bias)

        milliseconds: dict[str, float] = {}
        denied: dict[str, str] = {}
        operands: dict[str, Operand] = {}
        for choice in self.candidates(problem, device):
            backend = self.backends[choice.backend]
            try:
                if choice.backend not in operands:
                    operands.clear()  # one at a time on the device
                    operand = backend.allocate(problem.matrix, problem.dtype, device)
                    fill_([Filling(weight, codes, backend, problem.dtype, operand)])
                    operands[choice.backend] = operand
                operand = operands[choice.backend]

                def multiply(
                    rows: Tensor, backend: Backend = backend, operand: Operand = operand,
                    algorithm: str = choice.algorithm,
                ) -> Tensor:  # fmt: skip
                    return backend.product(operand, rows, bias, algorithm)

                for run in range(self._runs if choice != MASKED else 0):
                    samples[run % 2].normal_()
                    if reason := what_is_wrong(multiply, dense, matrix, samples[run % 2], bias):
                        denied[str(choice)] = reason
                        break
                else:
                    milliseconds[str(choice)] = self._stopwatch(lambda: multiply(samples[0]))
            except (RuntimeError, ValueError) as error:  # a candidate that fails is a candidate less
                denied[str(choice)] = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        best = min(milliseconds, key=lambda name: milliseconds[name], default=str(MASKED))
        dense_time = milliseconds.get(str(MASKED))
        if dense_time is not None and milliseconds[best] > MARGIN * dense_time:
            best = str(MASKED)
        return Decision(best, milliseconds, denied)

    def candidates(self, problem: Problem, device: torch.device) -> list[Choice]:
        """Return every way that could compute a problem here, the dense product first."""
        found = [MASKED]
        for name, backend in self.backends.items():
            if name != MASKED.backend and backend.why_not(device, problem.dtype, problem.shape) is None:
                names = backend.algorithms(problem.matrix, problem.rows, problem.dtype, device)
                found += [Choice(name, algorithm) for algorithm in names]
        return found

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
