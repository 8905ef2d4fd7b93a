"""The tables of a comparison."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .jobs import Failure
from .ratios import Ratio
from .summary import DENSE, Row, first_to_reach, mean_and_deviation
from .tasks import TASKS, Task

HEADER = ("method", "validation loss", "gap to dense", "accuracy", "sparse steps", "sparse FLOPs", "estimated time",
          "dense loss reached at", "ends", "violations", "steps", "seeds", "commit")  # fmt: skip
ACCURACY = HEADER.index("accuracy")


def cells(row: Row) -> list[str]:
    """Return a row's cells, in the order of :data:`HEADER`."""
    loss = spread([run.final for run in row.runs], "{:.4f}")
    if row.lost:
        loss += f" (not finite: seed {', '.join(map(str, row.lost))})"
    return [
        row.method,
        loss,
        spread(row.gaps, "{:+.4f}"),
        spread([100 * value for value in row.accuracies], "{:.1f}", " %"),
        f"{row.steps_share:.1%}",
        f"{row.flops_share:.1%}",
        f"{row.time:.3f}",
        _reached(row),
        " or ".join(sorted({run.ends for run in row.runs})),
        str(row.violations),
        _counts([run.steps for run in row.runs]),
        _counts([run.seed for run in row.runs]),
        ", ".join(sorted({run.commit for run in row.runs})),
    ]


def _counts(values: Sequence[int]) -> str:
    """Return different whole numbers, the consecutive ones as ``first-last``."""
    found = sorted(set(values))
    if len(found) > 1 and found[-1] - found[0] == len(found) - 1:
        return f"{found[0]}-{found[-1]}"
    return ", ".join(map(str, found))


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Return the mean, and the standard deviation if there are several values; of the finite ones."""
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    if math.isnan(mean):
        return "nan"
    text = form.format(mean)
    if not math.isnan(deviation):
        text += f" ± {form.replace('+', '').format(deviation)}"
    return text + unit


def show(rows: Sequence[Row], task: Task, title: str) -> None:
    """Print a task's table."""
    header, lines = _columns(rows, task)
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=190).print(table)


def write_markdown(
    path: Path,
    command: str,
    tables: Mapping[str, tuple[Task, list[Row]]],
    failures: Sequence[Failure],
    seeds: str,
    ratio: Ratio,
    environment: str,
    pictures: tuple[str, str],
) -> None:
    """Write a table for every task, with its conditions."""
    lines = [f"# Methods compared: `{command}`", ""]
    for task, rows in tables.values():
        header, body = _columns(rows, task)
        lines += [f"## {_title(task)}", "", line(header), line(["---"] * len(header)), *map(line, body), ""]
        lines += [
            f"{task.subject}; {task.steps} steps, {seeds}, sparse layers: "
            f"`{_targets(task)}`, {_precision(task)}. {_verdict(rows)}",
            "",
        ]
    for failure in failures:
        lines += [f"No result for {failure.job}: {failure.reason}", ""]
    lines += ["## How to read this", "", *_words(ratio, environment), ""]
    gaps, losses = pictures
    lines += [f"![gaps over the share of sparse FLOPs]({gaps})", "", f"![losses over estimated time]({losses})", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _title(task: Task) -> str:
    options = [option for option, sizes in TASKS.items() if task.name in {size.name for size in sizes.values()}]
    return f"{task.name} (`--task {options[0]}`)" if options else task.name


def _words(ratio: Ratio, environment: str) -> list[str]:
    return [
        f"Trained with {environment}. Mean ± standard deviation over seeds; the gap is to the dense run of the same",
        "seed that was made with a row's runs, began with the same weights and saw the same batches. Losses are in",
        "nats, and as they came.",
        "",
        "*Sparse steps* is the share of optimizer steps in which the mask of at least one layer was in force, *sparse",
        "FLOPs* the share of the layers' GEMM FLOPs, over the whole run, that could run on sparse tensor cores; layers",
        "that stay dense are in the whole. *Estimated time* is relative to dense, counting these GEMMs alone, if a",
        f"sparse one takes 1/{ratio.value:g} of the time; this ratio is {ratio.words}. A teacher's forward is in it.",
        "Convolutions larger than 1×1 count as dense, and every layer as if it had as many tokens.",
        "*Dense loss reached at* is when the dense run's final loss was reached at every seed, in dense steps of",
        "estimated time. *Ends* is what the finished model's weights are, and *violations* the most groups of four",
        "with a wrong mask at any mask search; *commit* is what a row's runs were made with. These are short runs of",
        "small models: a good number here need not be one at scale.",
    ]


def _verdict(rows: Sequence[Row]) -> str:
    order = first_to_reach(rows)
    dense = next((row for row in rows if row.method == DENSE), None)
    if dense is None or dense.reached_at is None:
        return "There is no final loss of every dense run to compare with."
    first = [row for row in order if row.method != DENSE and row.reached_at and row.reached_at < dense.reached_at]
    if not first:
        return (
            f"No method reached the dense runs' final losses at every seed before dense did ({dense.reached_at:.0f})."
        )
    times = ", ".join(f"{row.method} ({row.reached_at:.0f})" for row in first)
    return (
        f"First at the dense runs' final losses, in dense steps of estimated time: {times}; dense needs "
        f"{dense.reached_at:.0f}."
    )


def _reached(row: Row) -> str:
    times = [time for time in row.reached if time is not None]
    if not times:
        return "not reached"
    if row.reached_at is None:
        return f"not reached at {len(row.reached) - len(times)} of {len(row.reached)} seeds"
    return f"{row.reached_at:.0f}"


def _columns(rows: Sequence[Row], task: Task) -> tuple[list[str], list[list[str]]]:
    kept = [number for number in range(len(HEADER)) if task.accuracy or number != ACCURACY]
    return [HEADER[number] for number in kept], [[cells(row)[number] for number in kept] for row in rows]


def line(values: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return "| " + " | ".join(values) + " |"


def _targets(task: Task) -> str:
    return task.targets if isinstance(task.targets, str) else ", ".join(task.targets)


def _precision(task: Task) -> str:
    return {"32-true": "float32", "bf16-mixed": "bfloat16 autocast"}[task.precision]
