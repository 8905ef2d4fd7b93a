"""``scripts/bench``: benchmarks by name."""

import argparse
import sys
from pathlib import Path

import torch

QUICK_SECONDS = 100.0


def main() -> int:
    """Run a benchmark and return the exit code: 2 if it cannot run here."""
    parser = _parser()
    options = parser.parse_args()
    run = {"gemm": _grid, "linear": _grid, "step": _step, "figure": _figure, "kernels": _kernels}
    if options.command in run:
        return run[options.command](options)
    if options.rows % 4 or options.columns % 4 or min(options.rows, options.columns, options.repeats) < 1:
        parser.error("--rows and --columns must be positive multiples of 4, and --repeats at least 1.")
    import mask_search

    return mask_search.run(options.rows, options.columns, options.repeats, options.csv)


def _kernels(options: argparse.Namespace) -> int:
    import kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return kernels.run(options.shape, options.repeats or (50 if device == "cuda" else 7), options.csv, device)


def _grid(options: argparse.Namespace) -> int:
    import gemm
    import grid
    import linear

    benchmark = {"gemm": gemm, "linear": linear}[options.command]
    reason = grid.why_not(options.command, options.device)
    if reason is None and options.device == "cpu" and not (options.tokens and options.shape):
        reason = f"{options.command} --device cpu needs small --tokens and --shape: the whole grid is for a GPU."
    if reason is not None:
        print(reason)
        return 2
    dtypes = options.dtype or (["bfloat16"] if options.quick or options.command == "linear" else list(grid.DTYPES))
    return benchmark.run(
        grid.Grid(
            options.tokens or (benchmark.QUICK_TOKENS if options.quick else benchmark.TOKENS),
            options.shape or benchmark.SHAPES,
            [grid.DTYPES[name] for name in dtypes],
            options.repeats or (10 if options.quick else 30),
            options.device,
            options.csv,
            options.seconds or (QUICK_SECONDS if options.quick else float("inf")),
            getattr(options, "micro_batches", 1),
        )
    )


def _step(options: argparse.Namespace) -> int:
    try:
        import step
    except ImportError as error:
        print(f"step trains in Lightning, which cannot be imported here ({error}): pip install lightning.")
        return 2
    return step.run(
        step.Plan(
            options.model,
            options.batch or step.SIZES[options.model].batch,
            options.steps,
            options.backend or ["auto"],
            options.compile,
            options.mvue,
            options.device,
            options.csv,
            options.seconds or float("inf"),
        )
    )


def _figure(options: argparse.Namespace) -> int:
    try:
        import figure
    except ImportError as error:
        print(f"figure draws with matplotlib, which cannot be imported here ({error}): pip install matplotlib.")
        return 2
    return figure.run(options.csv, options.out, options.of, options.dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure sparsetrain on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    search = commands.add_parser("mask-search", help="transposable_mask against the 16×90 matrix product and argmax")
    search.add_argument("--rows", type=int, default=4096, help="of the weight (default: %(default)s)")
    search.add_argument("--columns", type=int, default=4096, help="of the weight (default: %(default)s)")
    search.add_argument("--repeats", type=int, default=9, help="timed calls of each method (default: %(default)s)")
    every = commands.add_parser(
        "kernels", help="every kernel, against the device's copy bandwidth on a GPU, or matmul-90 on a CPU"
    )
    every.add_argument("--repeats", type=int, default=0, help="timed calls of each (default: 50 on a GPU, 7 on a CPU)")
    gemm = commands.add_parser("gemm", help="products with a masked weight by every way, against the dense product")
    linear = commands.add_parser("linear", help="a layer's forward and backward pass with its share of packing")
    linear.add_argument(
        "--micro-batches", type=_count, default=1, help="of an optimizer step, which repacks (default: %(default)s)"
    )
    for grid in (gemm, linear):
        grid.add_argument("--tokens", action="append", type=_count, default=[], help="repeatable (default: 512…32768)")
        grid.add_argument("--dtype", action="append", choices=["bfloat16", "float16"], default=[], help="repeatable")
        grid.add_argument("--quick", action="store_true", help=f"what an H200 does in {QUICK_SECONDS:.0f} seconds")
        grid.add_argument("--repeats", type=_count, help="timed calls of each (default: 30, with --quick 10)")
    for shaped in (every, gemm, linear):
        text = "(O, I) of the weight, such as 4096x14336; repeatable (default: several)"
        shaped.add_argument("--shape", action="append", type=_shape, default=[], help=text)
    step = commands.add_parser("step", help="whole training steps of a GPT in Lightning, dense and sparse")
    step.add_argument("--model", choices=["124M", "1.3B", "tiny"], default="124M", help="(default: %(default)s)")
    step.add_argument("--steps", type=_count, default=100, help="the first fifth is not timed (default: %(default)s)")
    step.add_argument("--batch", type=_count, help="sequences a step (default: by model)")
    step.add_argument("--backend", action="append", default=[], help="of the sparse runs; repeatable (default: auto)")
    step.add_argument(
        "--compile",
        choices=["blocks", "model", "none"],
        default="blocks",
        help="what is compiled (default: %(default)s)",
    )
    step.add_argument("--mvue", action="store_true", help="also with weight gradients from 2:4 estimates")
    for limited in (gemm, linear, step):
        limited.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
        limited.add_argument("--seconds", type=float, help="begin nothing after so long")
    for stored in (search, every, gemm, linear, step):
        stored.add_argument("--csv", type=Path, help="append the rows to this file")
    figure = commands.add_parser("figure", help="draw the ratio to dense over tokens from the CSV of gemm or linear")
    figure.add_argument("--csv", type=Path, required=True, help="what gemm or linear wrote")
    figure.add_argument("--out", type=Path, required=True, help="a .png, .svg or .pdf")
    figure.add_argument("--of", default="gemm forward", help="or linear step, linear forward… (default: %(default)s)")
    figure.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1.")
    return int(text)


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()) or int(rows) % 4 or int(columns) % 4 or not int(rows) * int(columns):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: write rows and columns, multiples of 4, as 4096x14336."
        )
    return int(rows), int(columns)


if __name__ == "__main__":
    sys.exit(main())
