"""The demo's table, plot and report."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from sparsetrain import __version__
from sparsetrain.hardware.extras import require

from ..history import History

COLUMNS = (
    "run", "validation loss", "gap to dense", "kept fraction", "flip rate", "violations", "ends", "seconds",
)  # fmt: skip
NOTES = (
    "Validation loss is in nats per byte. Kept fraction (Σ|W⊙M| / Σ|W|) and flip rate (mask entries changed since the "
    "search before) are those of the last mask search whose masks were applied; a frozen mask has no flip rate. "
    "Seconds are training time, validation included; on a CPU the masked products are dense, so sparse runs are not "
    "faster there."
)


@dataclass(frozen=True)
class Result:
    """What a run of the demo ended with.

    Args:
        name: Of the run.
        loss: Final validation loss, nats per byte.
        seconds: Of training.
        history: Its validations and mask searches.
        violations: Groups of four that do not keep two, in masks in force at the end.
        ends: What the final weights are: ``"2:4"`` or ``"dense"``.
    """

    name: str
    loss: float
    seconds: float
    history: History
    violations: int
    ends: str

    def row(self, dense_loss: float) -> tuple[str, ...]:
        """Return the run's cells of the table."""
        refresh = self.history.last_in_force()
        metrics = refresh.metrics if refresh else {}
        moves = refresh is not None and refresh.phase == "sparse"
        return (
            self.name,
            f"{self.loss:.4f}",
            f"{self.loss - dense_loss:+.4f}",
            f"{metrics['kept_fraction_at_refresh']:.3f}" if refresh else "–",
            f"{metrics['flip_rate']:.4f}" if moves and "flip_rate" in metrics else "–",
            str(self.violations),
            self.ends,
            f"{self.seconds:.0f}",
        )


def print_table(results: list[Result]) -> None:
    """Print one line per run."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, no_wrap=True, justify="right" if index else "left")
    for result in results:
        table.add_row(*result.row(results[0].loss))
    Console(width=120).print(table)


def write_report(results: list[Result], path: Path, command: str, steps: int) -> None:
    """Write the table with its conditions as Markdown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    lines = [
        "# sparsetrain demo",
        "",
        f"`{command.strip()}`: {steps} steps each, {device}, {platform.system()}, torch {torch.__version__}, "
        f"sparsetrain {__version__}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(result.row(results[0].loss)) + " |" for result in results),
        "",
        NOTES,
        "",
        "![validation loss and flip rate](curves.png)",
        "",
    ]
    path.write_text("\n".join(lines))


def write_plot(results: list[Result], path: Path) -> None:
    """Draw validation loss and flip rate over steps."""
    matplotlib = require("matplotlib", "recipes", "the demo's plot")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, flips) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, result in enumerate(results):
        color = f"C{index}"
        points = result.history.validations
        losses.plot([p.step for p in points], [p.loss for p in points], "o-", color=color, label=result.name, ms=4)
        for phase, style, note in (("sparse", "o-", "applied"), ("dense", ":", "virtual")):
            label: str | None = f"{result.name} ({note})"
            for steps, rates in flip_segments(result.history, phase):
                flips.plot(steps, rates, style, color=color, label=label, ms=3)
                label = None
    losses.set(xlabel="optimizer steps", ylabel="validation loss (nats per byte)", title="Validation loss")
    flips.set(xlabel="optimizer steps", ylabel="flip rate", title="Mask entries changed per search", yscale="log")
    for axes in (losses, flips):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def flip_segments(history: History, phase: str) -> list[tuple[list[int], list[float]]]:
    """Return the steps and flip rates of every unbroken stretch of mask searches in a phase."""
    segments: list[tuple[list[int], list[float]]] = []
    broken = True
    for refresh in history.refreshes:
        rate = refresh.metrics.get("flip_rate" if phase == "sparse" else "virtual_flip_rate")
        if refresh.phase != phase or rate is None:
            broken = True
            continue
        if broken:
            segments.append(([], []))
            broken = False
        segments[-1][0].append(refresh.step)
        segments[-1][1].append(rate)
    return segments
