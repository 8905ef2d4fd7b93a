"""``X·(W⊙M)ᵀ`` by every way to sparse tensor cores against the dense product, verified before it is timed."""

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsetrain.backends import BACKENDS, Backend, CuSparseLtBackend
from sparsetrain.backends.cusparselt.providers import NvmathProvider, TorchProvider
from sparsetrain.backends.packing import PackJob, fill_
from sparsetrain.dispatch import (
    MASKED,
    Choice,
    Decision,
    DeviceFaultError,
    DispatchTable,
    Problem,
    Tuner,
    describe_environment,
)
from sparsetrain.dispatch.stopwatch import median_milliseconds
from sparsetrain.hardware.machine import cache_folder
from sparsetrain.kernels.mask_search import search_tiles

from .comparison import Comparison, Provider, set_count, take_turns
from .grid import Grid, Point, first_line, measure_grid
from .measure import milliseconds, quantiles

TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (8192, 28672))
QUICK_TOKENS = (8192, 2048, 32768)  # the most important first, as time may be short
WAYS: dict[str, Backend] = {
    "torch _cslt_sparse_mm": CuSparseLtBackend([TorchProvider()]),
    "cusparselt": CuSparseLtBackend([NvmathProvider()]),
    **{name: backend for name, backend in BACKENDS.items() if name not in ("cusparselt", MASKED.backend)},
}
Set = tuple[Tensor, Tensor, Tensor]  # weight [O, I] float32, codes, rows [T, I]


def run(grid: Grid, ways: Mapping[str, Backend] | None = None) -> int:
    """Measure a grid and return the exit code; ``ways`` are all on a GPU, and none on a CPU, by default."""
    if ways is None:
        ways = WAYS if grid.device == "cuda" else {}
    return measure_grid("gemm", grid, functools.partial(measure, ways=ways))


def measure(point: Point, grid: Grid, ways: Mapping[str, Backend]) -> list[Comparison]:
    """Verify the ways that run here and time them beside the dense product, with all of W and with W⊙M."""
    found = {label: verified(label, backend, point, grid) for label, backend in ways.items()}
    sets = [_set(point, grid.place) for _ in range(set_count(point.fewest_bytes, grid.device))]
    providers = [Provider("dense", [functools.partial(F.linear, rows, w.to(point.dtype)) for w, _, rows in sets])]
    providers += _providers(MASKED.backend, BACKENDS[MASKED.backend], {"": ""}, sets, point)
    for label, decision in found.items():
        if decision is not None:
            providers += _providers(label, ways[label], _chosen(label, ways[label], decision, point, grid), sets, point)
    comparison = Comparison("forward", point.flops, providers)
    take_turns(comparison, grid.repeats, grid.device)
    return [comparison]


def verified(label: str, backend: Backend, point: Point, grid: Grid) -> Decision | None:
    """Time the algorithms whose numbers are right and tell of the others; None if the way is closed here."""
    reason = backend.why_not(grid.place, point.dtype, point.shape)
    if reason is not None:
        grid.note(f"{label} does not run here: {reason}")
        return None
    pair = {MASKED.backend: BACKENDS[MASKED.backend], label: backend}
    stopwatch = median_milliseconds if grid.device == "cuda" else _by_the_clock
    table, environment = DispatchTable(cache_folder() / "dispatch.json"), describe_environment(grid.place)
    try:
        # it records faults, which a new process is to know; what it measures is not for training
        decision = Tuner(table, environment, stopwatch=stopwatch, backends=pair).measure(_problem(point), grid.place)
    except DeviceFaultError:
        raise
    except Exception as error:  # what a vendor's library raises is not known
        grid.note(f"{label} fails for {point.name} at {point.tokens} tokens: {first_line(error)}")
        return None
    denied: dict[str, list[str]] = {}
    for name, why in decision.denied.items():
        denied.setdefault(why, []).append(Choice.parse(name).algorithm or "default")
    for why, names in denied.items():
        print(f"{label}, {point.name}, {point.tokens} tokens: {', '.join(names)} not timed: {why}", flush=True)
    return decision


def _chosen(label: str, backend: Backend, decision: Decision, point: Point, grid: Grid) -> dict[str, str]:
    """Return the default and the fastest verified algorithm, by what is added to the provider's name."""
    problem = _problem(point)
    right = {Choice.parse(name): ms for name, ms in decision.milliseconds.items()}
    names = [choice.algorithm for choice in sorted(right, key=right.__getitem__) if choice.backend == label]
    every = backend.algorithms(problem.matrix, problem.rows, point.dtype, grid.place)
    chosen = {"": every[0]} if every and every[0] in names else {}
    return {**chosen, " best": names[0]} if names and len(every) > 1 else chosen


def _providers(
    label: str, backend: Backend, algorithms: Mapping[str, str], sets: list[Set], point: Point
) -> list[Provider]:
    if not algorithms:
        return []
    operands = []
    for weight, codes, _ in sets:
        operands.append(backend.allocate(point.shape, point.dtype, weight.device))
        fill_([PackJob(weight, codes, backend, point.dtype, operands[-1])])

    def calls(algorithm: str) -> list[Callable[[], Tensor]]:
        pairs = zip(operands, sets, strict=True)
        return [functools.partial(backend.product, operand, rows, None, algorithm) for operand, (_, _, rows) in pairs]

    return [Provider(label + suffix, calls(algorithm), algorithm) for suffix, algorithm in algorithms.items()]


def _problem(point: Point) -> Problem:
    return Problem("forward", point.shape, point.tokens, point.dtype)


def _set(point: Point, device: torch.device) -> Set:
    weight = torch.randn(point.shape, device=device)
    rows = torch.randn(point.tokens, point.shape[1], device=device, dtype=point.dtype)
    return weight, search_tiles(weight, True), rows


def _by_the_clock(call: Callable[[], object]) -> float:
    return quantiles(milliseconds(call, 3))[1]
