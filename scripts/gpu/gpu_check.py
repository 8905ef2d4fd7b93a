"""``scripts/gpu_check``: everything that only a GPU can show, in parts that write one tar each."""

import argparse
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from ..benchmarks.repository import commit
from .archive import pack
from .parts import PART_SECONDS, TITLES, parts
from .stage import GRACE, ROOT, Result, Stage, Starter, fork, run, spawn

CACHE = "cache"
LEAST_SECONDS = 5.0  # that a stage is begun for
LINE = 88
IMPORTED_ONCE = (
    "pytest", "hypothesis", "nvmath.bindings.cusparseLt", "torch._dynamo.testing", "sparsetrain.callbacks",
    "sparsetrain.recipes.gpt",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts and return the exit code: 0 if all went well, 1 if something failed, 2 without a GPU, 130 if ended."""
    parser = _parser()
    options = parser.parse_args(arguments)
    names = list(TITLES)
    for name in options.parts:
        if name not in names:
            parser.error(f"part is {name!r}: it must be one of {', '.join(names)}.")
    for number in options.number:
        if not 1 <= number <= len(names):
            parser.error(f"--part is {number}: it must be 1 to {len(names)} ({', '.join(names)}).")
    chosen = [*options.parts, *(names[number - 1] for number in options.number)] or names
    out: Path = options.out.resolve()
    if not options.dry_run and not _has_gpu():
        print(
            f"There is no CUDA device: on a machine with one, this runs {', '.join(chosen)} and fills {out}. "
            "--dry-run walks through it on a CPU."
        )
        return 2
    # a shell that starts this in the background has commands ignore SIGINT, and they would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    minutes = options.minutes or len(chosen) * PART_SECONDS / 60
    check = Check(out, options.dry_run, time.monotonic() + 60 * minutes)
    try:
        for name in dict.fromkeys(chosen):
            check.part(name)
    except KeyboardInterrupt:
        print("interrupted: what is there so far is kept.", flush=True)
        return 130
    finally:
        check.show()
    return int(not check.is_good)


class Check:
    """Runs parts, and keeps the summary and the tars up to date after every stage.

    Args:
        out: The folder of all results.
        dry_run: On a CPU, in the smallest sizes.
        end: When all must be over, by the monotonic clock.
    """

    def __init__(self, out: Path, dry_run: bool, end: float) -> None:
        self.out, self.dry_run, self.end = out, dry_run, end
        self.starter: Starter = _warm_fork() if dry_run else spawn
        self.environment = {"SPARSETRAIN_CACHE": str(out / CACHE), "PYTHONPATH": _python_path()}
        self.results: dict[str, dict[str, Result]] = {}  # of this call, by part
        self.tars: dict[str, Path] = {}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def is_good(self) -> bool:
        """Whether nothing failed or was ended."""
        return all(result.is_good for results in self.results.values() for result in results.values())

    def part(self, name: str) -> None:
        """Run a part's stages, as far as there is time."""
        print(f"{f' {name}: {TITLES[name]} ':=^{LINE}}", flush=True)
        end = min(self.end, time.monotonic() + PART_SECONDS) - GRACE
        spare = 0.0
        self.results[name] = {}
        facts = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "dry run": self.dry_run, **environment()}
        for stage in parts(self.out, self.dry_run)[name]:
            start = time.monotonic()
            limit = min(stage.seconds + spare, end - start)
            if limit < LEAST_SECONDS:
                self.results[name] |= {label: Result("not begun", None, 0.0) for label in stage.commands}
                self._keep(name, facts)
                continue
            self._stage(name, stage, limit, facts)
            spare = max(0.0, stage.seconds + spare - (time.monotonic() - start))

    def _stage(self, part: str, stage: Stage, limit: float, facts: dict[str, Any]) -> None:
        print(f"{f' {stage.name}, at most {limit:.0f} s ':-^{LINE}}", flush=True)
        for label in stage.commands:
            self.results[part][label] = Result("interrupted", None, 0.0)
        try:
            self.results[part] |= run(stage, self.out / part, limit, self.environment, self.starter)
        finally:
            self._keep(part, facts)

    def _keep(self, part: str, facts: dict[str, Any]) -> None:
        """Write the summary, with the parts of earlier calls, and the part's tar."""
        path = self.out / "summary.json"
        summary: dict[str, Any] = {"format": 1, "parts": {}}
        if path.exists():
            summary = json.loads(path.read_text())
        stages = {label: asdict(result) for label, result in self.results[part].items()}
        summary["parts"][part] = {**facts, "stages": stages}
        left_out: list[str] = []
        for _ in range(2):  # the tar holds the summary, which says what the tar does not hold
            summary["parts"][part]["left out of the tar"] = left_out
            path.write_text(json.dumps(summary, indent=1) + "\n")
            self.tars[part], found = pack(self.out, part, (part, CACHE))
            if found == left_out:
                break
            left_out = found

    def show(self) -> None:
        """Print how every stage of this call ended, and where the tars are."""
        for part, results in self.results.items():
            for label, result in results.items():
                print(f"{part:10} {label:32} {result.ended:28} {result.seconds:8.1f} s")
        for tar in self.tars.values():
            print(f"{tar} ({tar.stat().st_size / 2**20:.1f} MiB)")


def environment() -> dict[str, Any]:
    """Return GPU, driver, versions and commit, without the device: only stages make use of it."""
    from sparsetrain.hardware.machine import read_machine

    query = ["nvidia-smi", "--query-gpu=clocks.max.sm,power.limit,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    machine = {name: value for name, value in asdict(read_machine()).items() if value is not None}
    return {"machine": machine, "clock, power, memory": found, "commit": commit()}


def _warm_fork() -> Starter:
    """Import what stages import, once, so that a dry run on one core takes a minute and not four."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other make small products slow
    for name in IMPORTED_ONCE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # collections in forks would touch, and so copy, all of it
    return fork


def _python_path() -> str:
    return os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    names = list(TITLES)
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Run what needs a GPU, in parts of at most ten minutes, each in processes with limits. Every part "
        "writes OUT/PART.tar.gz, after every stage again. docs/gpu.md says how to send them.",
        epilog="parts:\n" + "\n".join(f"  {place}. {name}: {TITLES[name]}" for place, name in enumerate(names, 1)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="by name; all of them by default")
    parser.add_argument("--part", dest="number", action="append", type=int, default=[], help="by number; repeatable")
    parser.add_argument("--minutes", type=float, help="for all parts together (default: 9.5 for each)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="walk through it on a CPU, in the smallest sizes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
