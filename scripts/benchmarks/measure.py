"""Timing, peak memory and CSV rows for the benchmarks."""

import contextlib
import csv
import functools
import multiprocessing
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

import sparsetrain
from sparsetrain.kernels.torch_internals import cuda_sleep

from .repository import commit

FIELDS = (
    "kernel_name", "kernel_provider", "metric_name", "metric_unit", "x_name", "x_value", "y_value_20", "y_value_50",
    "y_value_80", "device", "driver", "threads", "torch_version", "triton_version", "sparsetrain_version", "commit",
    "timestamp",
)  # fmt: skip
AHEAD_CYCLES = 200_000  # of the GPU's clock, a tenth of a millisecond


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Time a call after one warm-up; returns every time in milliseconds."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


Events = tuple[torch.cuda.Event, torch.cuda.Event]


def recorded_event() -> torch.cuda.Event:
    """Return an event that the current stream reaches after what was enqueued before."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def events_around(call: Callable[[], object], cycles: int = AHEAD_CYCLES) -> Events:
    """Enqueue a call between two events; the host runs ahead for some cycles, so the time between is the device's."""
    cuda_sleep(cycles)
    start = recorded_event()
    call()
    return start, recorded_event()


def cuda_milliseconds(call: Callable[[torch.Tensor], object], inputs: list[torch.Tensor], repeats: int) -> list[float]:
    """Time a call on a GPU by events, on inputs in turn, so that none is in a cache; warms up on every input."""
    for argument in inputs:
        call(argument)
    torch.cuda.synchronize()
    pairs = [events_around(functools.partial(call, inputs[number % len(inputs)])) for number in range(repeats)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def extra_megabytes(call: Callable[[torch.Tensor], object], shape: tuple[int, int]) -> float:
    """Return how far a call on random scores, in a process of its own, raises the memory in use (peak over before)."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_extra_megabytes, call, shape).result()


def _extra_megabytes(call: Callable[[torch.Tensor], object], shape: tuple[int, int]) -> float:
    scores = torch.rand(shape)
    call(scores[:8, :8].contiguous())  # what is only imported at the first call is no working memory
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak; elsewhere the peak since the start counts
    before = _status("VmRSS")
    call(scores)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    for line in _lines(Path("/proc/self/status")):
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return the 20 %, 50 % and 80 % quantiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def quantile_cells(values: list[float]) -> dict[str, object]:
    """Return the cells of a CSV row that hold the quantiles, to five digits."""
    keys = ("y_value_20", "y_value_50", "y_value_80")
    return dict(zip(keys, (float(f"{value:.5g}") for value in quantiles(values)), strict=True))


def append_csv(path: Path, rows: list[dict[str, object]], device: str = "") -> None:
    """Append rows with the machine's facts; writes the header into a new file.

    Args:
        path: The file.
        rows: What was measured.
        device: ``"cuda"`` or ``"cpu"``: where; by default the GPU if there is one.
    """
    on_gpu = torch.cuda.is_available() and device != "cpu"
    facts: dict[str, object] = {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "driver": _driver(),
        "threads": torch.get_num_threads(),
        "torch_version": torch.__version__,
        "triton_version": triton.__version__,
        "sparsetrain_version": sparsetrain.__version__,
        "commit": commit(),
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    with contextlib.suppress(OSError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return ""


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
