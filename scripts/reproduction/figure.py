"""The pictures of a comparison, a panel for every task: gaps over the share of sparse FLOPs, and losses over time."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .ratios import Ratio
from .summary import DENSE, Row, mean_and_deviation, relative_times

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
COLUMNS = 3
"""Panels beside each other at most."""
SHOWN_FROM = 0.4
"""Of the steps: losses before it would hide the differences after it."""
APART = 0.02
"""Of the axis: points are drawn so far apart at least."""
OUTLIER = 4.0
"""Times the third quartile of the gaps: what is above stands at the edge, with its value."""


def plot_gaps(path: Path, tables: Mapping[str, Sequence[Row]], title: str) -> None:
    """Draw final losses minus those of dense training over the share of GEMM FLOPs that could run sparse.

    Args:
        path: The picture.
        tables: Task name to its rows.
        title: Above everything.
    """
    note = "mean ± standard deviation over seeds; points of equal shares stand side by side; ↑: beyond the axis"
    labels = {"xlabel": "GEMM FLOPs that could run sparse (%)", "ylabel": "final loss minus dense (nats)"}
    _plot(path, tables, f"{title}\n{note}", labels, _gaps)


def plot_losses(path: Path, tables: Mapping[str, Sequence[Row]], ratio: Ratio, title: str) -> None:
    """Draw validation losses over estimated time.

    Args:
        path: The picture.
        tables: Task name to its rows.
        ratio: Dense over sparse GEMM time.
        title: Above everything.
    """
    note = f"means over seeds; sparse GEMMs {ratio.value:g}× as fast, {ratio.source}"
    labels = {"xlabel": "estimated time in dense steps", "ylabel": "validation loss (nats)"}
    _plot(path, tables, f"{title}\n{note}", labels, partial(_losses, ratio=ratio.value))


def _plot(
    path: Path,
    tables: Mapping[str, Sequence[Row]],
    title: str,
    labels: Mapping[str, str],
    draw: Callable[[Any, Sequence[Row], Mapping[str, Mapping[str, Any]]], None],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    methods = list(dict.fromkeys(row.method for rows in tables.values() for row in rows))
    styles: dict[str, dict[str, Any]] = {
        method: _style(number) for number, method in enumerate(name for name in methods if name != DENSE)
    }
    styles[DENSE] = {"color": "black", "marker": "o"}
    columns = min(COLUMNS, len(tables))
    lines = math.ceil(len(tables) / columns)
    size = (6 * columns, 4.2 * lines + 0.35 * math.ceil(len(methods) / columns) + 0.3)
    figure, grid = plt.subplots(lines, columns, figsize=size, constrained_layout=True, squeeze=False)
    for axis in grid.flat[len(tables) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(grid.flat, tables.items(), strict=False):
        draw(axis, rows, styles)
        axis.set(**labels)
        axis.set_title(name, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
    lost = {row.method for rows in tables.values() for row in rows if row.lost}
    handles = [
        Line2D([], [], label=method + " †" * (method in lost), linestyle="none", markersize=7, **styles[method])
        for method in methods
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
    figure.suptitle(title + ("; †: a seed without a finite loss is not in it" if lost else ""), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def side_by_side(places: Sequence[float], apart: float) -> list[float]:
    """Move places that are closer than ``apart`` to each other, around their common mean; their order stays.

    Example:
        >>> side_by_side([50.0, 0.0, 50.0], apart=2.0)
        [49.0, 0.0, 51.0]
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(places)), key=lambda number: (places[number], number)):
        groups.append([number])
        while (
            len(groups) > 1
            and _middle(groups[-1], places) - _middle(groups[-2], places)
            < apart * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            last = groups.pop()
            groups[-1] += last
    moved = list(places)
    for group in groups:
        for turn, number in enumerate(group):
            moved[number] = _middle(group, places) + apart * (turn - (len(group) - 1) / 2)
    return moved


def ceiling(gaps: Sequence[float]) -> float:
    """Return the gap above which a method would hide the differences between the others; infinity if none is above.

    Example:
        >>> ceiling([0.01, 0.02, 0.03, 0.04, 9.0]), ceiling([0.01, 0.02, 0.03])
        (0.16, inf)
    """
    sizes = sorted(abs(gap) for gap in gaps if math.isfinite(gap))
    limit = OUTLIER * sizes[3 * (len(sizes) - 1) // 4] if sizes else math.inf
    return limit if limit and any(size > limit for size in sizes) else math.inf


def _middle(group: Sequence[int], places: Sequence[float]) -> float:
    return statistics.mean(places[number] for number in group)


def _gaps(axis: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]]) -> None:
    places = [100 * row.flops_share for row in rows]
    top = ceiling([mean_and_deviation(row.gaps)[0] for row in rows])
    for row, place in zip(rows, side_by_side(places, APART * max(places)), strict=True):
        mean, deviation = mean_and_deviation(row.gaps)
        if math.isnan(mean):
            continue
        if mean > top:
            axis.plot(place, top, linestyle="none", markersize=7, **styles[row.method])
            axis.annotate(f"↑ {mean:+.2f}", (place, top), (0, 7), textcoords="offset points", ha="center", fontsize=8)
            continue
        bar = None if math.isnan(deviation) else deviation
        axis.errorbar(
            place, mean, yerr=bar, linestyle="none", markersize=7, capsize=2, linewidth=1, **styles[row.method]
        )
    axis.axhline(0, color="black", linewidth=0.8)
    if math.isfinite(top):
        axis.set_ylim(top=1.15 * top)


def _losses(axis: Any, rows: Sequence[Row], styles: Mapping[str, Mapping[str, Any]], ratio: float) -> None:
    top, shown = ceiling([mean_and_deviation(row.gaps)[0] for row in rows]), []
    for row in rows:
        losses: dict[int, list[float]] = {}
        for run in row.runs:
            for step, loss, _ in run.validations:
                if step >= SHOWN_FROM * run.steps and step:
                    losses.setdefault(step, []).append(loss)
        times = [statistics.mean(relative_times(run, ratio)[step - 1] for run in row.runs) for step in losses]
        means = [mean_and_deviation(values)[0] for values in losses.values()]
        axis.plot(times, means, linewidth=2.0 if row.method == DENSE else 1.0, markersize=4, **styles[row.method])
        shown += means if mean_and_deviation(row.gaps)[0] <= top else []
        if row.method == DENSE and means and not math.isnan(means[-1]):
            axis.axhline(means[-1], color="black", linewidth=0.8, linestyle="--")
    if math.isfinite(top) and shown:
        axis.set_ylim(top=max(shown) * 1.02)


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
