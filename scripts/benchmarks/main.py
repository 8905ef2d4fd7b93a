"""``scripts/bench``: benchmarks by name."""

import argparse
import sys
from pathlib import Path

import mask_search
import torch

import kernels


def main() -> int:
    """Run a benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure sparsetrain on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("mask-search", help="transposable_mask against the 16×90 matrix product and argmax")
    search.add_argument("--rows", type=int, default=4096, help="of the weight (default: %(default)s)")
    search.add_argument("--columns", type=int, default=4096, help="of the weight (default: %(default)s)")
    search.add_argument("--repeats", type=int, default=9, help="timed calls of each method (default: %(default)s)")
    search.add_argument("--csv", type=Path, help="append the rows to this file")
    every = commands.add_parser(
        "kernels", help="every kernel, against the device's copy bandwidth on a GPU, or matmul-90 on a CPU"
    )
    every.add_argument(
        "--shape", action="append", type=_shape, default=[], help="such as 4096x14336; repeatable (default: several)"
    )
    every.add_argument("--repeats", type=int, default=0, help="timed calls of each (default: 50 on a GPU, 7 on a CPU)")
    every.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if options.command == "kernels":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return kernels.run(options.shape, options.repeats or (50 if device == "cuda" else 7), options.csv, device)
    if options.rows % 4 or options.columns % 4 or min(options.rows, options.columns, options.repeats) < 1:
        parser.error("--rows and --columns must be positive multiples of 4, and --repeats at least 1.")
    return mask_search.run(options.rows, options.columns, options.repeats, options.csv)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()) or int(rows) % 4 or int(columns) % 4 or not int(rows) * int(columns):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: write rows and columns, multiples of 4, as 4096x14336."
        )
    return int(rows), int(columns)


if __name__ == "__main__":
    sys.exit(main())
