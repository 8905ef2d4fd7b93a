"""The table, the CSV and the plot of a comparison."""

import csv
import itertools
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table
from training import Run

FIELDS = ("method", "seed", "step", "loss", "share_of_sparse_flops_so_far", "violations", "ends", "seconds",
          "environment", "commit")  # fmt: skip
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")


def relative_times(run: Run, ratio: float) -> list[float]:
    """Return the estimated time up to the end of each step, in dense steps, if sparse GEMMs take 1/ratio of the time.

    Only the linear layers' GEMMs are counted, so it is a bound on what sparsity can save: attention, the optimizer, the
    mask search and packing take time too.
    """
    return list(itertools.accumulate(1 - share * (1 - 1 / ratio) for share in run.shares))


def write_csv(path: Path, runs: list[Run], environment: str, commit: str) -> None:
    """Write a row for every validation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for run in runs:
            for step, loss in sorted(run.losses.items()):
                done = run.shares[:step]
                share = sum(done) / len(done) if done else 0.0
                writer.writerow([run.method, run.seed, step, f"{loss:.5f}", f"{share:.4f}", run.violations, run.ends,
                                 f"{run.seconds:.0f}", environment, commit])  # fmt: skip


def summarise(runs: list[Run], ratio: float) -> list[list[str]]:
    """Return a row for every method, with the gap to dense at equal seeds."""
    dense = {run.seed: run for run in runs if run.method == "dense"}
    rows = []
    for method in dict.fromkeys(run.method for run in runs):
        own = [run for run in runs if run.method == method]
        gaps = [run.final - dense[run.seed].final for run in own if run.seed in dense]
        times = [relative_times(run, ratio)[-1] / len(run.shares) for run in own]
        share = statistics.mean(sum(run.shares) / len(run.shares) for run in own)
        rows.append(
            [method, spread([run.final for run in own], "{:.4f}"), spread(gaps, "{:+.4f}"), f"{share:.1%}",
             f"{statistics.mean(times):.3f}", reached(own, dense, ratio), own[0].ends,
             str(max(run.violations for run in own))]
        )  # fmt: skip
    return rows


def reached(runs: list[Run], dense: dict[int, Run], ratio: float) -> str:
    """Say when the dense model's final loss was reached, in dense steps of estimated time; at every seed, or not."""
    times = []
    for run in runs:
        target = dense[run.seed].final if run.seed in dense else float("-inf")
        steps = [step for step, loss in sorted(run.losses.items()) if loss <= target and step]
        if not steps:
            return "not reached"
        times.append(relative_times(run, ratio)[steps[0] - 1])
    return f"{statistics.mean(times):.0f}"


def spread(values: list[float], form: str) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    if not values:
        return "–"
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


HEADER = ["method", "validation loss", "gap to dense", "sparse FLOPs", "estimated time", "dense loss reached at",
          "ends", "violations"]  # fmt: skip


def show(rows: list[list[str]], title: str) -> None:
    """Print the table."""
    table = Table(*HEADER, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=170).print(table)


def write_markdown(path: Path, rows: list[list[str]], lines: list[str], picture: str) -> None:
    """Write the table with its conditions."""
    table = ["| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows)]
    path.write_text("\n".join([lines[0], "", *table, "", *lines[1:], "", f"![losses]({picture})", ""]))


def plot(path: Path, runs: list[Run], ratio: float, title: str) -> None:
    """Draw the gap to dense against the share of sparse FLOPs, and loss against estimated time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    dense = {run.seed: run.final for run in runs if run.method == "dense"}
    for number, method in enumerate(dict.fromkeys(run.method for run in runs)):
        own = [run for run in runs if run.method == method]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "os^Dv"[number // len(COLOURS) % 5]}
        shares = [100 * sum(run.shares) / len(run.shares) for run in own]
        left.plot(shares, [run.final - dense[run.seed] for run in own], linestyle="none", label=method, **style)
        steps = sorted(set.intersection(*(set(run.losses) for run in own)) - {0})
        times = [statistics.mean(relative_times(run, ratio)[step - 1] for run in own) for step in steps]
        losses = [statistics.mean(run.losses[step] for run in own) for step in steps]
        right.plot(times[1:], losses[1:], linewidth=1.2, markersize=4, **style)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="share of linear GEMM FLOPs that could run sparse (%)", ylabel="final loss minus dense (nats)")
    right.set(xlabel=f"estimated time in dense steps, sparse GEMMs at {ratio:g}× (published)", ylabel="validation loss")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
