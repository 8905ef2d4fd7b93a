"""All runs of a comparison: one after another or in several processes, going on where an earlier call stopped."""

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .controls import CONTROLS
from .methods import build
from .tasks import Task
from .training import Run, Validation, train


@dataclass(frozen=True)
class Job:
    """A run to be made: a task, the row's name and its method as plain data, and a seed."""

    task: Task
    method: str
    entry: Mapping[str, Any]
    seed: int

    def __str__(self) -> str:
        return f"{self.task.name}, {self.method}, seed {self.seed}"

    def key(self, conditions: str) -> str:
        """Return a digest of everything its numbers depend on; ``conditions`` are the sources and the environment."""
        parts = [self.task.describe(), build(self.entry).describe(), self.seed, conditions]
        parts += [self.entry[key] for key in CONTROLS if key in self.entry]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    job: Job
    reason: str


class Finished:
    """Finished runs in a file of JSON lines, found by their keys.

    Args:
        path: The file; made when the first run is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Run]:
        """Return every run; lines that an interruption left incomplete are passed over."""
        runs = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                values = json.loads(line)
                key = values.pop("key")
                values["validations"] = [Validation(*entry) for entry in values["validations"]]
                runs[key] = Run(**values)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
        return runs

    def add(self, key: str, run: Run) -> None:
        """Append a run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps({"key": key, **asdict(run)}) + "\n")


def run_all(
    jobs: Sequence[Job],
    finished: Finished,
    conditions: str,
    workers: int,
    threads: int,
    stamp: Callable[[Run], Run] = lambda run: run,
    fresh: bool = False,
) -> tuple[list[Run], list[Failure]]:
    """Make the runs that are not finished; returns all of them in the order of the jobs, and those that failed.

    Args:
        jobs: The runs of the comparison.
        finished: Where finished ones are.
        conditions: See :meth:`Job.key`.
        workers: Processes; 1 stays in this one.
        threads: Of torch in each process; 0 leaves torch's default.
        stamp: Puts environment and commit on a new run.
        fresh: Make finished ones again.
    """
    keys = [job.key(conditions) for job in jobs]
    known = {} if fresh else finished.read()
    runs = {number: known[key] for number, key in enumerate(keys) if key in known}
    if runs:
        print(f"{len(runs)} of {len(jobs)} runs are in {finished.path}.", file=sys.stderr, flush=True)
    failures = []
    left = {number: job for number, job in enumerate(jobs) if number not in runs}
    for done, (number, result) in enumerate(_results(left, workers, threads), len(runs) + 1):
        counted = f"[{done}/{len(jobs)}] {jobs[number]}"
        if isinstance(result, Run):
            runs[number] = stamp(result)
            finished.add(keys[number], runs[number])
            print(f"{counted}: {result.final:.4f} in {result.seconds:.0f} s", file=sys.stderr, flush=True)
        else:
            failures.append(Failure(jobs[number], result))
            print(f"{counted} fails: {result}", file=sys.stderr, flush=True)
    # names may have changed since
    ordered = [
        replace(runs[number], task=job.task.name, method=job.method)
        for number, job in enumerate(jobs)
        if number in runs
    ]
    return ordered, failures


def _results(jobs: Mapping[int, Job], workers: int, threads: int) -> Iterator[tuple[int, Run | str]]:
    """Return each job's number with its run, or with the reason why there is none, as they come."""
    if workers == 1:
        _set_threads(threads)
        for number, job in jobs.items():
            try:
                yield number, _run(job)
            except Exception as error:  # the others go on
                yield number, _reason(error)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_set_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(_run, job): number for number, job in jobs.items()}
        try:
            for future in as_completed(futures):
                failed = future.exception()
                yield futures[future], future.result() if failed is None else _reason(failed)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run(job: Job) -> Run:
    return train(job.task, job.method, build(job.entry), job.seed, job.entry)


def _set_threads(threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
