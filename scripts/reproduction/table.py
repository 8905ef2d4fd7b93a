"""The CSV of a comparison, which is published, and from which a later one takes the runs that it does not repeat."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from .training import Run, Validation

FIELDS = ("task", "method", "seed", "step", "loss", "accuracy", "share_of_sparse_flops_so_far",
          "share_of_sparse_steps_so_far", "share_of_taught_steps_so_far", "violations", "ends", "seconds",
          "environment", "commit", "final_loss_of_dense")  # fmt: skip


def write_csv(path: Path, runs: Iterable[Run]) -> None:
    """Write a row for every validation; the shares are of the steps until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for run in runs:
            for step, loss, accuracy in run.validations:
                writer.writerow(
                    [
                        run.task,
                        run.method,
                        run.seed,
                        step,
                        f"{loss:.5f}",
                        "" if accuracy is None else f"{accuracy:.5f}",
                        f"{run.flops_share(step) if step else 0:.6f}",
                        f"{run.steps_share(step) if step else 0:.6f}",
                        f"{sum(run.taught[:step]) / step if step else 0:.6f}",
                        run.violations,
                        run.ends,
                        f"{run.seconds:.0f}",
                        run.environment,
                        run.commit,
                        "" if run.dense is None else f"{run.dense:.5f}",
                    ]
                )


def read_csv(path: Path) -> list[Run]:
    """Return the runs of a file that :func:`write_csv` wrote.

    Between two validations the shares of the steps are their mean, and the masked steps come last.

    Raises:
        ValueError: If it has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path} has the columns {', '.join(reader.fieldnames or ())}: it must have {FIELDS}.")
        lines: dict[tuple[str, str, str], list[dict[str, str]]] = {}
        for line in reader:
            lines.setdefault((line["task"], line["method"], line["seed"]), []).append(line)
    return [_run_of(entries) for entries in lines.values()]


def together(measured: Sequence[Run], kept: Iterable[Run]) -> list[Run]:
    """Return runs, and those of others that are of other tasks, methods or seeds; grouped by task."""
    known = {(run.task, run.method, run.seed) for run in measured}
    runs = [*measured, *(run for run in kept if (run.task, run.method, run.seed) not in known)]
    order = {task: number for number, task in enumerate(dict.fromkeys(run.task for run in runs))}
    return sorted(runs, key=lambda run: order[run.task])


def _run_of(lines: Sequence[dict[str, str]]) -> Run:
    first = lines[0]
    shares: list[float] = []
    masked: list[bool] = []
    taught: list[bool] = []
    for line in lines:
        step, new = int(line["step"]), int(line["step"]) - len(shares)
        total = float(line["share_of_sparse_flops_so_far"]) * step - sum(shares)
        shares += [total / new] * new if new else []
        for flags, column in ((masked, "share_of_sparse_steps_so_far"), (taught, "share_of_taught_steps_so_far")):
            count = round(float(line[column]) * step) - sum(flags)
            flags += [False] * (new - count) + [True] * count
    return Run(
        first["task"],
        first["method"],
        int(first["seed"]),
        [
            Validation(int(line["step"]), float(line["loss"]), float(line["accuracy"]) if line["accuracy"] else None)
            for line in lines
        ],
        shares,
        masked,
        taught,
        int(first["violations"]),
        first["ends"],
        float(first["seconds"]),
        first["environment"],
        first["commit"],
        float(first["final_loss_of_dense"]) if first["final_loss_of_dense"] else None,
    )
