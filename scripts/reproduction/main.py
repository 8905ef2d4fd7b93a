"""``scripts/reproduce_methods``: the same models by every method, several seeds, dense beside them."""

import sys
from dataclasses import replace

from .command_line import command_of, ratio_of, read, tasks_of
from .figure import plot_gaps, plot_losses
from .jobs import Finished, Job, run_all
from .methods import METHODS
from .provenance import commit, environment, sources_digest
from .report import show, write_markdown
from .summary import Row, beside_dense, summarise
from .table import read_csv, together, write_csv
from .tasks import TASKS, Task
from .training import Run


def main(arguments: list[str] | None = None) -> int:
    """Train, compare and return the exit code: 1 if a mask was wrong or a run failed."""
    options = read(arguments)
    tasks, ratio = tasks_of(options), ratio_of(options)
    jobs = [
        Job(task, method, METHODS[method], seed)
        for task in tasks
        for method in options.method or task.rows or METHODS
        for seed in range(options.seeds)
    ]
    here, now = environment(options.threads), commit()

    def stamp(run: Run) -> Run:
        return replace(run, environment=here, commit=now)

    finished = Finished(options.runs / "runs.jsonl")
    digest = f"{sources_digest()}, {here}"
    runs, failures = run_all(jobs, finished, digest, options.jobs, options.threads, stamp, options.fresh)
    table, gaps, text = (options.out.with_suffix(suffix) for suffix in (".csv", ".png", ".md"))
    losses = gaps.with_name(f"{gaps.stem}-losses.png")
    runs = together(beside_dense(runs), read_csv(table) if options.keep else [])
    known = {task.name: task for models in TASKS.values() for task in models.values()}
    known |= {task.name: task for task in tasks}
    names = [name for name in known if any(run.task == name for run in runs)]
    summaries = [(name, summarise([run for run in runs if run.task == name], ratio.value)) for name in names]
    tables: dict[str, tuple[Task, list[Row]]] = {name: (known[name], rows) for name, rows in summaries}
    seeds = f"{options.seeds} seed{'s' if options.seeds > 1 else ''}"
    for task, rows in (tables[task.name] for task in tasks if task.name in tables):
        show(rows, task, f"{task.name}, {task.steps} steps, {seeds}; {ratio.source} ratio {ratio.value:g}")
    for failure in failures:
        print(f"{failure.job} fails: {failure.reason}", file=sys.stderr)
    if not tables:
        return 1
    write_csv(table, runs)
    rows_of = {name: rows for name, (_, rows) in tables.items()}
    plot_gaps(gaps, rows_of, f"{seeds}; {here}")
    plot_losses(losses, rows_of, ratio, f"{seeds}; {here}")
    write_markdown(text, command_of(options), tables, failures, seeds, ratio, here, (gaps.name, losses.name))
    print(f"wrote {table}, {gaps.name}, {losses.name} and {text.name}")
    return int(bool(failures) or any(run.violations for run in runs))


if __name__ == "__main__":
    sys.exit(main())
