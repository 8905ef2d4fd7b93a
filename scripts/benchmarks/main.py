"""``scripts/bench``: benchmarks by name."""

import argparse
import sys
from pathlib import Path

import mask_search


def main() -> int:
    """Run a benchmark and return the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure sparsetrain on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("mask-search", help="transposable_mask against the 16×90 matrix product and argmax")
    search.add_argument("--rows", type=int, default=4096, help="of the weight (default: %(default)s)")
    search.add_argument("--columns", type=int, default=4096, help="of the weight (default: %(default)s)")
    search.add_argument("--repeats", type=int, default=9, help="timed calls of each method (default: %(default)s)")
    search.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if options.rows % 4 or options.columns % 4 or min(options.rows, options.columns, options.repeats) < 1:
        parser.error("--rows and --columns must be positive multiples of 4, and --repeats at least 1.")
    return mask_search.run(options.rows, options.columns, options.repeats, options.csv)


if __name__ == "__main__":
    sys.exit(main())
