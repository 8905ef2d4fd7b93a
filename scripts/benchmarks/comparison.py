"""Contests: providers of the same result, timed in turn in one process, compared with the first of them."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from .measure import AHEAD_CYCLES, events_around, quantile_cells, quantiles

HOST_CALLS = (20, 200)  # fewest and most of a median host time
HOST_SECONDS = 0.2  # of device time that these calls may take
MOST_SETS = 64  # of tiny inputs, which then stay in the cache
CYCLES_PER_MS = 2_000_000  # no GPU's clock is much faster, so that the host's lead is long enough


@dataclass
class Provider:
    """What computes a result.

    Args:
        name: In the table and the CSV.
        calls: One for each set of inputs; each enqueues all work of the result.
        algorithm: Which of its algorithms, if it has several.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    algorithm: str = ""
    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


@dataclass
class Comparison:
    """Providers of one result; the first is what the others are compared with.

    Args:
        what: The result, such as ``"forward"``.
        flops: Floating-point operations of the dense computation.
        providers: In the order of the table.
    """

    what: str
    flops: float
    providers: list[Provider]

    def ratio(self, provider: Provider) -> float:
        """Return how many times as fast as the first provider one is, by medians."""
        return quantiles(self.providers[0].device_ms)[1] / quantiles(provider.device_ms)[1]


def set_count(fewest_bytes: int, device: str) -> int:
    """Return how many sets of inputs are more than a GPU's cache can hold, if a call reads at least so much of one."""
    if device == "cpu":
        return 1
    return min(max(2, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / fewest_bytes)), MOST_SETS)


def take_turns(comparison: Comparison, repeats: int, device: str) -> None:
    """Time every provider, one call each in turn; on a CPU by the clock, on a GPU by events, and the host's share."""
    for provider in comparison.providers:
        for call in provider.calls:
            call()
    if device == "cpu":
        for number in range(repeats):
            for provider in comparison.providers:
                provider.device_ms += _host_milliseconds([provider.calls[number % len(provider.calls)]], 1)
        return
    cycles = []
    for provider in comparison.providers:
        host = quantiles(_host_milliseconds(provider.calls, HOST_CALLS[0]))[2]
        cycles.append(max(AHEAD_CYCLES, int(3 * host * CYCLES_PER_MS)))
        torch.cuda.synchronize()
    pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in comparison.providers]
    turn = 0
    for _ in range(repeats):
        for place, provider in enumerate(comparison.providers):
            # every turn takes the next set, so that no provider finds the rows of the one before it in the cache
            pairs[place].append(events_around(provider.calls[turn % len(provider.calls)], cycles[place]))
            turn += 1
    torch.cuda.synchronize()
    for place, provider in enumerate(comparison.providers):
        provider.device_ms = [start.elapsed_time(end) for start, end in pairs[place]]
        fitting = int(1e3 * HOST_SECONDS / quantiles(provider.device_ms)[1])
        count = min(max(fitting, HOST_CALLS[0]), HOST_CALLS[1])
        provider.host_ms = _host_milliseconds(provider.calls, count)
        torch.cuda.synchronize()


def show(title: str, comparisons: Sequence[Comparison], device: str) -> None:
    """Print one table of several comparisons."""
    table = Table(
        "what",
        "provider",
        "algorithm",
        "ms (20 %)",
        "ms (median)",
        "ms (80 %)",
        "TFLOP/s",
        "host ms",
        "ratio to dense",
        title=f"{title}; ratio: dense time / time",
    )
    for comparison in comparisons:
        for provider in comparison.providers:
            low, median, high = quantiles(provider.device_ms)
            host = f"{quantiles(provider.host_ms)[1]:.3f}" if device == "cuda" else "-"
            table.add_row(
                comparison.what,
                provider.name,
                provider.algorithm,
                *(f"{value:.3f}" for value in (low, median, high)),
                f"{comparison.flops / median / 1e9:.3g}",
                host,
                f"{comparison.ratio(provider):.2f}",
            )
        table.add_section()
    Console(width=140).print(table)


def rows(
    command: str, comparisons: Sequence[Comparison], tokens: int, problem: str, device: str
) -> list[dict[str, object]]:
    """Return the CSV rows of a table; ``problem`` is the weight's shape and the dtype, as in ``4096x4096 bfloat16``."""
    result: list[dict[str, object]] = []
    for comparison in comparisons:
        for provider in comparison.providers:
            common = {
                "kernel_name": f"{command} {comparison.what} {problem}",
                "kernel_provider": provider.name,
                "x_name": "tokens",
                "x_value": tokens,
            }
            name = "device time" if device == "cuda" else "wall time"
            metrics = [(name, "ms", provider.device_ms)]
            if provider.host_ms:
                metrics.append(("host time", "ms", provider.host_ms))
            if provider.algorithm.isdigit():
                metrics.append(("algorithm", "id", [float(provider.algorithm)]))
            for metric, unit, values in metrics:
                result.append({**common, "metric_name": metric, "metric_unit": unit, **quantile_cells(values)})
    return result


def _host_milliseconds(calls: Sequence[Callable[[], object]], count: int) -> list[float]:
    times = []
    for number in range(count):
        call = calls[number % len(calls)]
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times
