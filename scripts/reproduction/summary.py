"""The numbers of a comparison: one row for every method, beside dense at equal seeds."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .training import Run

DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """A method's runs of one task.

    Args:
        method: The row's name.
        runs: One for every seed.
        gaps: Final loss minus that of the dense run of the same seed, where there is one.
        reached: When each run reached the dense run's final loss, in dense steps of estimated time, or None.
        time: Estimated time over that of dense.
    """

    method: str
    runs: list[Run]
    gaps: list[float]
    reached: list[float | None]
    time: float

    @property
    def steps_share(self) -> float:
        """Share of steps in which a mask was in force."""
        return statistics.mean(run.steps_share() for run in self.runs)

    @property
    def flops_share(self) -> float:
        """Share of GEMM FLOPs that could run sparse."""
        return statistics.mean(run.flops_share() for run in self.runs)

    @property
    def accuracies(self) -> list[float]:
        """The last accuracies; empty if the task has none."""
        last = [run.validations[-1].accuracy for run in self.runs]
        return [value for value in last if value is not None]

    @property
    def reached_at(self) -> float | None:
        """When the dense runs' final losses were reached on average; None unless every run did."""
        times = [time for time in self.reached if time is not None]
        return statistics.mean(times) if times and len(times) == len(self.reached) else None

    @property
    def lost(self) -> list[int]:
        """Seeds whose final loss is no finite number."""
        return [run.seed for run in self.runs if not math.isfinite(run.final)]

    @property
    def violations(self) -> int:
        """Most wrong groups of any run; must be 0."""
        return max(run.violations for run in self.runs)


def summarise(runs: Sequence[Run], ratio: float) -> list[Row]:
    """Return a row for every method of one task's runs.

    Args:
        runs: Of one task.
        ratio: Dense over sparse GEMM time.
    """
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        rows.append(
            Row(
                method,
                own,
                [run.final - run.dense for run in own if run.dense is not None],
                [None if run.dense is None else reached(run, run.dense, ratio) for run in own],
                statistics.mean(relative_times(run, ratio)[-1] / run.steps for run in own),
            )
        )
    return rows


def beside_dense(runs: Sequence[Run]) -> list[Run]:
    """Return runs that were made together, each with the final loss of the dense run of its task and seed."""
    dense = {(run.task, run.seed): run.final for run in runs if run.method == DENSE}
    return [replace(run, dense=dense.get((run.task, run.seed))) for run in runs]


def relative_times(run: Run, ratio: float) -> list[float]:
    """Return the estimated time up to the end of each step, in dense steps, if sparse GEMMs take 1/ratio of the time.

    Only the GEMMs of the counted layers are in it, so it is a bound on what sparsity can save: the optimizer, the mask
    search and packing take time too.
    """
    steps = zip(run.shares, run.taught, strict=True)
    return list(itertools.accumulate(1 - share * (1 - 1 / ratio) + taught / 3 for share, taught in steps))


def reached(run: Run, target: float, ratio: float) -> float | None:
    """Return when a loss was first reached, in dense steps of estimated time, or None."""
    times = relative_times(run, ratio)
    return next((times[entry.step - 1] for entry in run.validations if entry.step and entry.loss <= target), None)


def first_to_reach(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that reached the dense runs' final losses at every seed, the earliest first."""
    times = [(row.reached_at, number) for number, row in enumerate(rows)]
    return [rows[number] for _, number in sorted((time, number) for time, number in times if time is not None)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation of the finite values; NaN where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.mean(finite) if finite else math.nan
    return mean, statistics.stdev(finite) if len(finite) > 1 else math.nan
