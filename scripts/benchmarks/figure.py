"""Draws the ratio to dense over tokens, a panel for every weight, from the CSV of ``gemm`` or ``linear``."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BASELINE = "dense"
METRICS = ("device time", "wall time")
# Okabe and Ito's palette, told apart by colour-blind readers; markers tell the lines apart without colours
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"),
)  # fmt: skip
FACTS = ("device", "driver", "torch_version", "triton_version", "sparsetrain_version", "commit")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as dense a provider was: by medians, and between the quantiles of its own time."""

    low: float
    median: float
    high: float


Panels = dict[str, dict[str, dict[int, Ratio]]]
"""By shape, provider and tokens."""


def run(path: Path, out: Path, what: str, dtype: str) -> int:
    """Draw, and return the exit code."""
    if not path.is_file():
        print(f"{path} is no file: write one with scripts/bench gemm --csv {path}.")
        return 2
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if _is_of(row, what, dtype)]
    if not any(row["kernel_provider"] == BASELINE for row in rows):
        print(f"{path} has no times of {what!r} in {dtype} with the provider {BASELINE!r}: nothing can be drawn.")
        return 2
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        print(f"{path} has rows of several devices ({', '.join(devices)}): write one file for each.")
        return 2
    figure = draw(panels_of(rows), what, dtype, caption(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=200)
    print(f"{out} shows {what} in {dtype} on {devices[0]}.")
    return 0


def panels_of(rows: list[dict[str, str]]) -> Panels:
    """Return the ratios; of a problem that was measured several times, the last, so that its dense time is its own."""
    measured: dict[tuple[str, int], dict[str, dict[str, dict[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        point = row["kernel_name"].split()[-2], int(row["x_value"])
        measured[point][row["timestamp"]][row["kernel_provider"]] = row
    panels: Panels = defaultdict(lambda: defaultdict(dict))
    for (shape, tokens), times in measured.items():
        providers = times[max(times)]
        dense = float(providers[BASELINE]["y_value_50"]) if BASELINE in providers else None
        for name, row in providers.items():
            if dense is not None and name != BASELINE:
                high, median, low = (dense / float(row[f"y_value_{quantile}"]) for quantile in (20, 50, 80))
                panels[shape][name][tokens] = Ratio(low, median, high)
    return panels


def caption(rows: list[dict[str, str]]) -> str:
    """Return device, versions and dates of the rows, each once."""
    facts = {fact: " / ".join(dict.fromkeys(row[fact] for row in rows if row[fact])) for fact in FACTS}
    dates = sorted({row["timestamp"][:10] for row in rows})
    words = [
        facts["device"],
        f"driver {facts['driver']}" if facts["driver"] else "",
        f"torch {facts['torch_version']}",
        f"triton {facts['triton_version']}",
        f"sparsetrain {facts['sparsetrain_version']} ({facts['commit']})",
        " / ".join(dates),
    ]
    return ", ".join(word for word in words if word)


def draw(panels: Panels, what: str, dtype: str, text: str) -> Figure:
    """Return the figure: a panel for every shape, a line for every provider, dense at 1."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    styles = {name: STYLES[place % len(STYLES)] for place, name in enumerate(names)}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(3.4 * columns, 6.4), 2.9 * lines + 1.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for place, (ax, shape) in enumerate(zip(axes.flat, panels, strict=False)):
        _draw_panel(ax, shape, panels[shape], styles)
        if place % columns == 0:
            ax.set_ylabel("times as fast as dense")
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    handles = {}
    for ax in figure.axes:
        handles.update({label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    labels = [*names, BASELINE]
    # a title of the figure's own would lie over the legend
    figure.legend(
        [handles[name] for name in labels],
        labels,
        loc="outside upper center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=8,
        title=f"{what}, {dtype}",
    )
    figure.supxlabel(
        f"tokens\n{text}\nlines: median dense time over median time; bands: over the 20 and 80 % quantiles of the time",
        fontsize=7,
    )
    return figure


def _draw_panel(ax: Axes, shape: str, lines: dict[str, dict[int, Ratio]], styles: dict[str, tuple[str, str]]) -> None:
    ax.axhline(1, color="#555555", linestyle="--", linewidth=1, label=BASELINE)
    every = sorted({tokens for points in lines.values() for tokens in points})
    for name, points in lines.items():
        tokens = sorted(points)
        color, marker = styles[name]
        ax.plot(tokens, [points[x].median for x in tokens], color=color, marker=marker, markersize=4, label=name)
        ax.fill_between(
            tokens, [points[x].low for x in tokens], [points[x].high for x in tokens], color=color, alpha=0.15, lw=0
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(every, [str(x) for x in every], fontsize=7, rotation=30)
    ax.minorticks_off()
    ax.set_title(f"weight {shape.replace('x', ' × ')}", fontsize=9)
    ax.grid(axis="y", alpha=0.3)


def _is_of(row: dict[str, str], what: str, dtype: str) -> bool:
    name = row["kernel_name"].split()
    return " ".join(name[:-2]) == what and name[-1:] == [dtype] and row["metric_name"] in METRICS
