"""The command line of ``scripts/reproduce_methods``: which runs it names, and what is said of wrong ones."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import torch

from .methods import METHODS
from .ratios import PUBLISHED, Ratio, given, measured
from .summary import DENSE
from .tasks import MODELS, TASKS, Task

EXAMPLES = """
examples:
  scripts/reproduce_methods                                      # every task and its methods, three seeds: many hours
  scripts/reproduce_methods --task gpt --task image              # small GPT and images, all methods
  scripts/reproduce_methods --jobs 2                             # two runs at a time, the same numbers
  scripts/reproduce_methods --task image --method fst,\\ as\\ published --method recommended --seeds 1 --out runs/try
  scripts/reproduce_methods --model 124M --measured docs/results/gemm.csv   # on a GPU

An interrupted comparison goes on where it stopped when it is called again. The exit status is 1 if a mask was wrong
or a run failed.
"""


def read(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options; ends the process with a sentence if one is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.steps == 1:
        parser.error("--steps is 1: at least 2 are needed, so that a schedule has parts.")
    options.task = list(dict.fromkeys(options.task or [name for name in TASKS if options.model in TASKS[name]]))
    for name in options.task:
        if options.model not in TASKS[name]:
            parser.error(f"--model is {options.model}: task {name} has {', '.join(TASKS[name])}.")
    options.method = list(dict.fromkeys([DENSE, *options.method])) if options.method else []
    if options.keep and not options.out.with_suffix(".csv").exists():
        parser.error(f"--keep needs a table, but there is no {options.out.with_suffix('.csv')}: leave it out.")
    try:
        ratio_of(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return options


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """Return the tasks that the options name."""
    tasks = [TASKS[name][options.model] for name in options.task]
    return [replace(task, steps=options.steps) for task in tasks] if options.steps else tasks


def ratio_of(options: argparse.Namespace) -> Ratio:
    """Return the ratio of GEMM times that the options name.

    Raises:
        ValueError: If it is not above 0, or was not measured.
        OSError: If the measurement cannot be read.
    """
    if options.measured is not None:
        return measured(options.measured)
    return PUBLISHED if options.ratio is None else given(options.ratio)


def command_of(options: argparse.Namespace) -> str:
    """Return the command that makes the same comparison; that of a row if only some were made."""
    tasks = ["TASK"] if options.keep else options.task
    words = ["scripts/reproduce_methods", *(f"--task {name}" for name in tasks), f"--model {options.model}"]
    words += [f"--steps {options.steps}"] if options.steps else []
    words += [f"--seeds {options.seeds}"]
    if options.keep:
        words += ["--method METHOD"]
    elif options.method:
        words += [f"--method {shlex.quote(method)}" for method in options.method]
    words += ["--keep"] if options.keep else []
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce_methods",
        description="Train the same models by every method and compare losses; uses a GPU if there is one.",
        epilog=EXAMPLES + "\nmethods: " + "; ".join(METHODS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", action="append", choices=TASKS, help="repeatable (default: all that have the model)")
    parser.add_argument("--model", choices=MODELS, default="small", help="size of the models (default: %(default)s)")
    parser.add_argument("--steps", type=_count, help="optimizer steps of each run (default: by task)")
    parser.add_argument("--seeds", type=_count, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument(
        "--method", action="append", choices=METHODS, metavar="NAME", help="one below; repeatable (default: by task)"
    )
    ratio = parser.add_mutually_exclusive_group()
    ratio.add_argument(
        "--ratio", type=float, help=f"dense over sparse GEMM time (default: {PUBLISHED.value}, published)"
    )
    ratio.add_argument(
        "--measured", type=Path, metavar="CSV", help="take this ratio from what scripts/bench gemm --csv wrote"
    )
    parser.add_argument(
        "--threads",
        type=_count,
        default=0 if torch.cuda.is_available() else 1,
        help="of torch in each process (default: 1 without a GPU, else torch's)",
    )
    parser.add_argument("--jobs", type=_count, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="train finished runs again")
    parser.add_argument(
        "--keep", action="store_true", help="keep the rows of the table at --out that are not among the runs"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce_methods"), help="finished runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/methods"), help="files without suffix (default: %(default)s)"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1.")
    return int(text)
