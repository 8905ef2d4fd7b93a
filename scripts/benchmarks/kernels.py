"""Every kernel against the memory's speed and against what there was before, in one run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparsetrain.kernels.gated_activation import gated_activation, gated_activation_backward
from sparsetrain.kernels.mask_search import search_tiles, search_tiles_, search_tiles_with_mask, search_transposable
from sparsetrain.kernels.masked_update import add_masked_decays_, apply_masks_
from sparsetrain.kernels.mvue import ESTIMATORS, mvue
from sparsetrain.kernels.pack import pack_tiles, pack_tiles_, search_and_pack, search_and_pack_
from sparsetrain.kernels.pack.reference import pack
from sparsetrain.kernels.statistics import tile_statistics

from .baselines import BASELINES, apex_style_argmax, best_chunk, matmul90
from .measure import append_csv, cuda_milliseconds, milliseconds, quantiles

SHAPES = {"cuda": [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672)], "cpu": [(4096, 4096)]}
MLP_7B = [(11008, 4096), (11008, 4096), (4096, 11008)] * 32
COPY_ENTRIES = 1 << 29  # of the copy that measures the memory


@dataclass(frozen=True)
class Entry:
    """One line of the table: who does what, and the bytes that it must read and write at least."""

    kernel: str
    provider: str
    call: Callable[[Any], object]
    bytes_per_entry: float
    dtype: torch.dtype = torch.float32
    prepare: Callable[[Tensor], Any] = lambda weight: weight  # untimed


def run(shapes: list[tuple[int, int]], repeats: int, csv: Path | None, device: str) -> int:
    """Check the kernels, time all of them in turn, print and store the table."""
    torch.manual_seed(0)
    wrong = gate(device)
    if wrong:
        print(f"{wrong} on {device} differs from the reference: nothing is timed.")
        return 1
    bandwidth = copy_bandwidth() if device == "cuda" else None
    for shape in shapes or SHAPES[device]:
        entries, notes = candidates(device, shape)
        times = timings(entries, shape, repeats, device)
        show(shape, entries, times, bandwidth, notes)
        if csv is not None:
            append_csv(csv, rows(shape, entries, times, bandwidth))
    if device == "cuda":
        whole_model(repeats, csv)
    return 0


def gate(device: str) -> str | None:
    """Return the first operator whose result differs from the reference's bits, on random weights with ties and NaN."""
    weight = torch.randn(1028, 2052)
    weight[:256] = torch.randint(-2, 3, (256, 2052)).float()
    weight[300, ::7] = float("nan")
    codes = search_transposable(weight, magnitude=True)
    if not torch.equal(search_tiles(weight.to(device), True).cpu(), codes):
        return "search_tiles"
    finite = weight.nan_to_num()
    wanted = [search_transposable(finite, magnitude=True)]
    wanted += pack(finite, wanted[0], torch.bfloat16)
    found = search_and_pack(finite.to(device), torch.bfloat16)
    if not all(torch.equal(part.cpu(), want) for part, want in zip(found, wanted, strict=True)):
        return "search_and_pack"
    repacked = pack_tiles(finite.to(device), wanted[0].to(device), torch.bfloat16)
    if not all(torch.equal(part.cpu(), want) for part, want in zip(repacked, wanted[1:], strict=True)):
        return "pack_tiles"
    return None


def candidates(device: str, shape: tuple[int, int]) -> tuple[list[Entry], list[str]]:
    """Return what can run here, and a sentence for each baseline that cannot."""
    weight = torch.randn(shape, device=device)
    codes = search_tiles(weight, True)
    gradient, decay = torch.zeros_like(weight), torch.full((), 1e-4, device=device)
    half = torch.bfloat16
    both = 2 * (2 / 2 + 2 / 16)  # bytes of the packed operands of W and Wᵀ, of a 16-bit weight, an entry
    entries = [
        Entry("search", "sparsetrain", lambda w: search_tiles(w, True), 4 + 1 / 8),
        Entry("search and mask", "sparsetrain", lambda w: search_tiles_with_mask(w, True), 5 + 1 / 8),
        Entry("search and pack", "sparsetrain", lambda w: search_and_pack(w, half), 4 + 1 / 8 + both),
        Entry("pack", "sparsetrain", lambda w: pack_tiles(w, codes, half), 4 + 1 / 8 + both),
        Entry("statistics", "sparsetrain", lambda w: tile_statistics([w], [codes], [codes]), 4 + 2 / 8),
        Entry("masked decay", "sparsetrain", lambda w: add_masked_decays_([gradient], [w], [codes], decay), 12 + 1 / 8),
        Entry("apply mask", "sparsetrain", lambda w: apply_masks_([gradient], [codes]), 8 + 1 / 8),
    ]
    if device == "cuda":
        entries += [
            Entry("search", "sparsetrain", lambda w: search_tiles(w, True), 2 + 1 / 8, half),
            Entry("search and pack", "sparsetrain", lambda w: search_and_pack(w, half), 2 + 1 / 8 + both, half),
            Entry("swiglu", "sparsetrain", lambda x: gated_activation(x, x, "swiglu"), 4, half),
            Entry("swiglu backward", "sparsetrain", lambda x: gated_activation_backward(x, x, x, "swiglu"), 6, half),
        ]
        counter = torch.zeros(2, dtype=torch.int64, device=device)
        entries += [
            Entry(f"mvue {name}", "sparsetrain", lambda y, name=name: mvue(y, counter, 0, 0, name), 2 + 9 / 8, half)
            for name in ESTIMATORS
        ]
    chunk = best_chunk(weight.abs()) if device == "cpu" else weight.numel() // 16
    entries.append(Entry("search and mask", "matmul-90", lambda w: matmul90(w, chunk), 5, prepare=torch.abs))
    entries.append(Entry("search and mask", "apex-style argmax", apex_style_argmax, 5, prepare=torch.abs))
    notes = []
    for baseline in BASELINES if device == "cuda" else ():
        try:
            baseline.call(baseline.prepare(weight.to(half)))
            what = (baseline.kernel, baseline.provider, baseline.call, baseline.bytes_per_entry)
            entries.append(Entry(*what, half, baseline.prepare))
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            notes.append(f"{baseline.provider} does not run here: {str(error).splitlines()[0]}")
    return entries, notes


def timings(entries: list[Entry], shape: tuple[int, int], repeats: int, device: str) -> list[list[float]]:
    """Return milliseconds of every entry, taken in turn, so that a machine that slows down slows all."""
    times: list[list[float]] = [[] for _ in entries]
    if device == "cpu":
        weight = torch.randn(shape)
        inputs = [entry.prepare(weight) for entry in entries]
        for _ in range(repeats):
            for place, entry in enumerate(entries):
                times[place] += milliseconds(lambda entry=entry, x=inputs[place]: entry.call(x), 1)
        return times
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for dtype in (torch.float32, torch.bfloat16):
        copies = max(2, 3 * cache // (shape[0] * shape[1] * dtype.itemsize) + 1)  # more than the cache can hold
        weights = [torch.randn(shape, device="cuda").to(dtype) for _ in range(copies)]
        for _ in range(3):
            for place, entry in enumerate(entries):
                if entry.dtype == dtype:
                    times[place] += cuda_milliseconds(entry.call, list(map(entry.prepare, weights)), repeats)
    return times


def copy_bandwidth() -> float:
    """Return the bytes a second that a copy of 2 GiB reads and writes."""
    source = torch.empty(COPY_ENTRIES, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    median = quantiles(cuda_milliseconds(target.copy_, [source], 20))[1]
    return 2 * source.numel() * 4 / (median / 1e3)


def whole_model(repeats: int, csv: Path | None) -> None:
    """Time refreshing every MLP weight of a 7B model: masks alone, masks and operands, operands alone."""
    weights = [torch.randn(shape, device="cuda").bfloat16() for shape in MLP_7B]
    parts = [search_and_pack(weight, torch.bfloat16) for weight in weights]
    columns = [[part[place] for part in parts] for place in range(5)]
    calls: dict[str, Callable[[Tensor], object]] = {
        "refresh masks": lambda _: search_tiles_(weights, columns[0], True),
        "refresh masks and operands": lambda _: search_and_pack_(weights, *columns, []),
        "repack operands": lambda _: pack_tiles_(weights, *columns, []),
    }
    result = []
    for name, call in calls.items():
        low, median, high = quantiles(cuda_milliseconds(call, weights[:1], max(3, repeats // 3)))
        print(f"{name} of all MLP weights of a 7B model (bfloat16): {median:.2f} ms")
        result.append(
            {
                "kernel_name": name,
                "kernel_provider": "sparsetrain",
                "metric_name": "time",
                "metric_unit": "ms",
                "x_name": "model",
                "x_value": "MLP of a 7B model, bfloat16",
                "y_value_20": low,
                "y_value_50": median,
                "y_value_80": high,
            }
        )
    if csv is not None:
        append_csv(csv, result)


def show(
    shape: tuple[int, int], entries: list[Entry], times: list[list[float]], bandwidth: float | None, notes: list[str]
) -> None:
    """Print one table."""
    last = "of copy" if bandwidth else "of matmul-90"
    table = Table(
        "kernel",
        "provider",
        "input",
        "ms (20 %)",
        "ms (median)",
        "ms (80 %)",
        "GB/s",
        last,
        title=f"{shape[0]} × {shape[1]}"
        + (f", device copy {bandwidth / 1e9:.0f} GB/s" if bandwidth else f", {torch.get_num_threads()} threads"),
    )
    baseline = next(quantiles(t)[1] for e, t in zip(entries, times, strict=True) if e.provider == "matmul-90")
    for entry, values in zip(entries, times, strict=True):
        low, median, high = quantiles(values)
        speed = entry.bytes_per_entry * shape[0] * shape[1] / (median / 1e3)
        relative = f"{speed / bandwidth:.0%}" if bandwidth else f"{median / baseline:.2f}×"
        cells = [entry.kernel, entry.provider, str(entry.dtype).removeprefix("torch.")]
        table.add_row(*cells, *(f"{value:.3f}" for value in (low, median, high)), f"{speed / 1e9:.0f}", relative)
    Console(width=120).print(table)
    for note in notes:
        print(note)


def rows(
    shape: tuple[int, int], entries: list[Entry], times: list[list[float]], bandwidth: float | None
) -> list[dict[str, object]]:
    """Return the CSV rows of one table."""
    result: list[dict[str, object]] = []
    for entry, values in zip(entries, times, strict=True):
        found = [round(value, 4) for value in quantiles(values)]
        common = {
            "kernel_name": entry.kernel,
            "kernel_provider": entry.provider,
            "x_name": "shape, input",
            "x_value": f"{shape[0]}x{shape[1]} {str(entry.dtype).removeprefix('torch.')}",
        }
        quantities = dict(zip(("y_value_20", "y_value_50", "y_value_80"), found, strict=True))
        result.append({**common, "metric_name": "time", "metric_unit": "ms", **quantities})
        if bandwidth:
            share = [entry.bytes_per_entry * shape[0] * shape[1] / (value / 1e3) / bandwidth for value in found]
            quantities = dict(zip(("y_value_20", "y_value_50", "y_value_80"), sorted(share), strict=True))
            result.append({**common, "metric_name": "share of copy bandwidth", "metric_unit": "", **quantities})
    return result
