"""``transposable_mask`` against matmul-90: every tile times the 90 patterns, then argmax."""

import functools
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sparsetrain import transposable_mask

from .baselines import CHUNKS, best_chunk, matmul90
from .measure import append_csv, extra_megabytes, milliseconds, quantiles


def run(rows: int, columns: int, repeats: int, csv: Path | None) -> int:
    """Check that both find masks of the same sum, time them in turn, print and store the table."""
    torch.manual_seed(0)
    scores = torch.randn(rows, columns).abs()
    ours, theirs = transposable_mask(scores), matmul90(scores, CHUNKS[0])
    kept, best = ((scores.double() * mask).sum().item() for mask in (ours, theirs))
    if kept < best * (1 - 1e-9):
        print(
            f"transposable_mask keeps {kept}, matmul-90 keeps {best}: the masks are not optimal, so nothing is timed."
        )
        return 1
    chunk = best_chunk(scores)
    times: dict[str, list[float]] = {"transposable_mask": [], "matmul-90": []}
    memory = {
        "transposable_mask": extra_megabytes(transposable_mask, (rows, columns)),
        "matmul-90": extra_megabytes(functools.partial(matmul90, chunk=chunk), (rows, columns)),
    }
    for _ in range(repeats):  # in turn, so that a machine that slows down slows both
        times["transposable_mask"] += milliseconds(lambda: transposable_mask(scores), 1)
        times["matmul-90"] += milliseconds(lambda: matmul90(scores, chunk), 1)
    _print(rows, columns, chunk, times, memory)
    if csv is not None:
        append_csv(csv, _rows(rows, columns, times, memory), "cpu")
    return 0


def _print(rows: int, columns: int, chunk: int, times: dict[str, list[float]], memory: dict[str, float]) -> None:
    table = Table(
        "method",
        "ms (20 %)",
        "ms (median)",
        "ms (80 %)",
        "of matmul-90",
        "extra memory (MB)",
        title=f"exact transposable masks of {rows} × {columns} float32, {torch.get_num_threads()} threads",
    )
    baseline = quantiles(times["matmul-90"])[1]
    for name, values in times.items():
        low, median, high = quantiles(values)
        label = f"{name} (best chunk: {chunk} tiles)" if name == "matmul-90" else name
        cells = (f"{low:.1f}", f"{median:.1f}", f"{high:.1f}", f"{median / baseline:.2f}×", f"{memory[name]:.0f}")
        table.add_row(label, *cells)
    Console(width=120).print(table)


def _rows(rows: int, columns: int, times: dict[str, list[float]], memory: dict[str, float]) -> list[dict[str, object]]:
    result: list[dict[str, object]] = []
    for name, values in times.items():
        common = {
            "kernel_name": "mask_search",
            "kernel_provider": name,
            "x_name": "shape",
            "x_value": f"{rows}x{columns}",
        }
        low, median, high = (round(value, 3) for value in quantiles(values))
        size = round(memory[name], 1)
        for metric, unit, cells in (("time", "ms", (low, median, high)), ("extra memory", "MB", (size, size, size))):
            keys = ("y_value_20", "y_value_50", "y_value_80")
            result.append({**common, "metric_name": metric, "metric_unit": unit, **dict(zip(keys, cells, strict=True))})
    return result
