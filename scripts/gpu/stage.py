"""Stages of ``scripts/gpu_check``: commands with a limit, their output kept and shown, ended politely."""

import contextlib
import multiprocessing
import os
import runpy
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ("-m", "pytest")
NOT_HERE = 2  # exit code of a benchmark that cannot run here
FAULTED = 3  # and of one that an algorithm took the device from: a new process leaves that algorithm out
MOST_BEGINNINGS = 4
PATIENCE = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
"""What ends a command, and the seconds until the next: on SIGINT pytest writes its report and Python cleans up."""
GRACE = PATIENCE[0][1] + PATIENCE[1][1]


@dataclass(frozen=True)
class Stage:
    """Commands that answer one question.

    Args:
        name: In the summary.
        commands: Arguments of Python, by the name of their log.
        seconds: After which it is ended; what earlier stages leave of theirs is added.
        together: How many commands run at once.
    """

    name: str
    commands: Mapping[str, Sequence[str]]
    seconds: float
    together: int = 1


@dataclass
class Result:
    """How a command ended: ``"passed"``, ``"failed (1)"``, ``"not run"`` or ``"ended after 70 s (2)"``."""

    ended: str
    code: int | None
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong: what cannot run here is no failure."""
        return self.ended in ("passed", "not run")


class Process(Protocol):
    """A command under way, the leader of a process group."""

    @property
    def pid(self) -> int:
        """Its number, and that of its group."""

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""


class Starter(Protocol):
    """Starts Python with some arguments; everything it prints goes to a file descriptor."""

    def __call__(self, command: Sequence[str], output: int, environment: Mapping[str, str]) -> Process:
        """Start it, in a process group of its own."""


def spawn(command: Sequence[str], output: int, environment: Mapping[str, str]) -> Process:
    """Start a new Python."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )


class _Fork:
    def __init__(self, process: "multiprocessing.context.ForkProcess") -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode


def fork(command: Sequence[str], output: int, environment: Mapping[str, str]) -> Process:
    """Run a module in a fork, which has imported what this process has: for machines without a GPU."""
    process = multiprocessing.get_context("fork").Process(target=_become, args=(command, output, environment))
    process.start()
    return _Fork(process)


def _become(command: Sequence[str], output: int, environment: Mapping[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = list(command[1:])
    sys.path[0] = str(ROOT)
    runpy.run_module(command[1], run_name="__main__", alter_sys=True)


@dataclass
class _Running:
    label: str
    command: Sequence[str]
    process: Process
    pipe: int
    log: BinaryIO
    start: float = field(default_factory=time.monotonic)

    def copy(self, show: bool) -> bool:
        """Take over what it has printed; False at the end of it."""
        data = os.read(self.pipe, 1 << 16)
        self.log.write(data)
        self.log.flush()
        if show:
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()
        return bool(data)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # a group that is gone
            os.killpg(self.process.pid, number)


def run(
    stage: Stage, folder: Path, limit: float, environment: Mapping[str, str], starter: Starter = spawn
) -> dict[str, Result]:
    """Run a stage's commands, show and keep what they print, and end those that are not done after ``limit`` seconds.

    A second interrupt while it ends them kills them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for label in stage.commands:
        (folder / f"{label}.log").unlink(missing_ok=True)
    waiting = list(stage.commands.items())
    running: list[_Running] = []
    results: dict[str, Result] = {}
    begun: Counter[str] = Counter()
    deadline = time.monotonic() + limit
    show = stage.together == 1
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < stage.together:
                begun[waiting[0][0]] += 1
                running.append(_start(*waiting.pop(0), folder, environment, starter))
            _attend(running, results, show, min(0.1, max(0.0, deadline - time.monotonic())))
            waiting += _faulted(stage, results, begun)
    finally:
        for number, seconds in PATIENCE:
            for command in running:
                command.signal(number)
            until = time.monotonic() + seconds
            ended = f"ended after {limit:.0f} s"
            while running and time.monotonic() < until:
                with contextlib.suppress(KeyboardInterrupt):
                    _attend(running, results, show, 0.1, ended)
        for command in running:  # nothing ends what waits in the driver; it is left to the system
            _finish(command, results, f"could not be ended after {limit:.0f} s", None)
        for label, _ in waiting:
            results[label] = Result("not begun", None, 0.0)
    return results


def _faulted(stage: Stage, results: dict[str, Result], begun: Mapping[str, int]) -> list[tuple[str, Sequence[str]]]:
    """Take out the results of benchmarks that are to begin again, and return them."""
    again = [
        label
        for label, result in results.items()
        if result.code == FAULTED and not _is_pytest(stage.commands[label]) and begun[label] < MOST_BEGINNINGS
    ]
    for label in again:
        del results[label]
    return [(label, stage.commands[label]) for label in again]


def _start(
    label: str, command: Sequence[str], folder: Path, environment: Mapping[str, str], starter: Starter
) -> _Running:
    reader, writer = os.pipe()
    os.set_inheritable(writer, False)
    try:
        process = starter(command, writer, {"PYTHONUNBUFFERED": "1", "COLUMNS": "160", **environment})
    finally:
        os.close(writer)
    return _Running(label, command, process, reader, (folder / f"{label}.log").open("ab"))


def _attend(
    running: list[_Running], results: dict[str, Result], show: bool, seconds: float, ended: str | None = None
) -> None:
    """Copy output for some seconds at most, and note which commands have ended."""
    with selectors.DefaultSelector() as selector:
        for command in running:
            selector.register(command.pipe, selectors.EVENT_READ, command)
        silent = True
        for key, _ in selector.select(seconds):
            silent = not key.data.copy(show) and silent
    if silent and seconds:
        time.sleep(min(seconds, 0.02))  # a closed pipe is always ready
    for command in list(running):
        code = command.process.poll()
        if code is None:
            continue
        command.signal(signal.SIGKILL)  # workers that it left, which would keep the device
        while _is_ready(command.pipe) and command.copy(show):
            pass
        running.remove(command)
        _finish(command, results, f"{ended} ({code})" if ended else _verdict(command.command, code), code)
        if not show:
            print(f"{command.label}: {results[command.label].ended}", flush=True)


def _is_ready(pipe: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        return bool(selector.select(0))


def _finish(command: _Running, results: dict[str, Result], ended: str, code: int | None) -> None:
    os.close(command.pipe)
    command.log.close()
    results[command.label] = Result(ended, code, round(time.monotonic() - command.start, 1))


def _verdict(command: Sequence[str], code: int) -> str:
    if code == 0:
        return "passed"
    return "not run" if code == NOT_HERE and not _is_pytest(command) else f"failed ({code})"


def _is_pytest(command: Sequence[str]) -> bool:
    return tuple(command[:2]) == PYTEST  # whose exit codes are its own
