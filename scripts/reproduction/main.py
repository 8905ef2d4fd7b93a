"""``scripts/reproduce_methods``: the same small GPT by every method, several seeds, dense beside them."""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from methods import METHODS
from report import plot, show, summarise, write_csv, write_markdown
from training import SIZES, Run, train

from sparsetrain import __version__
from sparsetrain.dispatch import describe_environment

PUBLISHED_RATIO = 1.5
"""Dense over sparse GEMM time at 4096 tokens and more, bf16, on A100, H100 PCIe and B200: median of 1.55 to 1.63 in
SlideSparse, arXiv 2603.05232, less what 700 W parts lose; not measured by this project."""


def main() -> int:
    """Train, compare and return the exit code: 1 if a mask was wrong."""
    options = _options()
    runs: list[Run] = []
    for name in options.method or METHODS:
        for seed in range(options.seeds):
            runs.append(train(name, METHODS[name], seed, options.steps, SIZES[options.model]))
            print(f"{name}, seed {seed}: {runs[-1].final:.4f} in {runs[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = f"{describe_environment(device)}, sparsetrain {__version__}"
    title = f"GPT {options.model}, {options.steps} steps, {options.seeds} seeds"
    rows = summarise(runs, options.ratio)
    show(rows, title)
    out: Path = options.out
    write_csv(out.with_suffix(".csv"), runs, environment, _commit())
    plot(out.with_suffix(".png"), runs, options.ratio, f"{title}; {environment}")
    write_markdown(out.with_suffix(".md"), rows, _words(options, environment), out.with_suffix(".png").name)
    print(f"wrote {out.with_suffix('.csv')}, .png and .md")
    return int(any(run.violations for run in runs))


def _words(options: argparse.Namespace, environment: str) -> list[str]:
    size = SIZES[options.model]
    return [
        f"# Methods compared: `scripts/reproduce_methods --model {options.model} --steps {options.steps} --seeds "
        f"{options.seeds}`",
        f"Byte-level GPT of width {size.width} and {size.depth} blocks on Python source code, MLP layers sparse, "
        f"{size.batch} × {size.context} bytes a step, AdamW; {environment}.",
        "Mean ± standard deviation over seeds; the gap is to the dense run of the same seed.",
        "",
        "*Sparse FLOPs* is the share of the linear layers' GEMM FLOPs, over the whole run, that could run on sparse",
        "tensor cores; head and attention are in the whole. *Estimated time* is relative to dense, counting these",
        f"GEMMs alone, if a sparse one takes 1/{options.ratio:g} of the time: a published ratio, not one we measured.",
        "*Dense loss reached at* is when the dense run's final loss was reached at every seed, in dense steps of",
        "estimated time. A short run of a small model: a good λ or head here need not be one at scale. Losses are as",
        "they came.",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/reproduce_methods",
        description="Train the same GPT by every method and compare losses; uses a GPU if there is one.",
    )
    parser.add_argument("--model", choices=SIZES, default="small", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one; repeatable (default: all)")
    parser.add_argument(
        "--ratio", type=float, default=PUBLISHED_RATIO,
        help="dense over sparse GEMM time, for the estimate (default: %(default)s, published)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/methods"), help="files without suffix (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.method and "dense" not in options.method:
        options.method.insert(0, "dense")
    if options.steps < 40 or options.seeds < 1:
        parser.error(f"--steps is {options.steps} and --seeds {options.seeds}: at least 40 and 1 are needed.")
    return options


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
