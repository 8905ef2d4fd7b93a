"""``scripts/bench``: benchmarks by name."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sparsetrain.backends import Backend

QUICK_SECONDS = 100.0


def main() -> int:
    """Run a benchmark and return the exit code: 2 if it cannot run here."""
    parser = _parser()
    options = parser.parse_args()
    run = {
        "gemm": _grid, "linear": _grid, "step": _step, "figure": _figure, "kernels": _kernels, "model": _model,
        "host": _host,
    }  # fmt: skip
    if getattr(options, "stand_in", False):
        from . import stand_in

        stand_in.install()
    if options.command in run:
        return run[options.command](options)
    if options.rows % 4 or options.columns % 4 or min(options.rows, options.columns, options.repeats) < 1:
        parser.error("--rows and --columns must be positive multiples of 4, and --repeats at least 1.")
    from . import mask_search

    return mask_search.run(options.rows, options.columns, options.repeats, options.csv)


def _kernels(options: argparse.Namespace) -> int:
    from . import kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return kernels.run(options.shape, options.repeats or (50 if device == "cuda" else 7), options.csv, device)


def _host(options: argparse.Namespace) -> int:
    from . import host

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return host.run(options.repeats, options.csv)


def _grid(options: argparse.Namespace) -> int:
    from . import gemm, grid, linear

    benchmark = {"gemm": gemm, "linear": linear}[options.command]
    ways = _ways(options, gemm.WAYS) if options.command == "gemm" else None
    reason = grid.why_not(options.command, options.device)
    if reason is None and options.device == "cpu" and not (options.tokens and options.shape):
        reason = f"{options.command} --device cpu needs small --tokens and --shape: the whole grid is for a GPU."
    if reason is not None:
        print(reason)
        return 2
    dtypes = options.dtype or (["bfloat16"] if options.quick or options.command == "linear" else list(grid.DTYPES))
    whole = grid.Grid(
        options.tokens or (benchmark.QUICK_TOKENS if options.quick else benchmark.TOKENS),
        options.shape or benchmark.SHAPES,
        [grid.DTYPES[name] for name in dtypes],
        options.repeats or (10 if options.quick else 30),
        options.device,
        options.csv,
        options.seconds or (QUICK_SECONDS if options.quick else float("inf")),
        getattr(options, "micro_batches", 1),
    )
    return gemm.run(whole, ways) if options.command == "gemm" else linear.run(whole)


def _ways(options: argparse.Namespace, known: "Mapping[str, Backend]") -> "Mapping[str, Backend] | None":
    """Return the ways that are asked for by name; None for those of the device."""
    if options.stand_in:
        from . import stand_in

        known = stand_in.backends()
    if options.way:
        return {name: known[name] for name in options.way}
    return known if options.stand_in else None


def _model(options: argparse.Namespace) -> int:
    from . import model

    print(model.table())
    return 0


def _step(options: argparse.Namespace) -> int:
    device = options.device if torch.cuda.is_available() else "cpu"
    if device != options.device and options.model != "tiny":
        print(f"step --model {options.model} needs a CUDA device and there is none here: --model tiny runs on a CPU.")
        return 2
    try:
        from . import step
        from .trainee import SIZES
    except ImportError as error:
        print(f"step trains a GPT of the recipes, which cannot be imported here ({error}): pip install lightning.")
        return 2
    return step.run(
        step.Plan(
            options.model,
            options.batch or SIZES[options.model].batch,
            options.steps,
            options.rounds,
            options.backend or ["auto"],
            options.compile,
            options.mvue,
            not options.no_fp8,
            options.optimizer,
            device,
            options.csv,
            options.seconds or float("inf"),
            options.peak_tflops,
        )
    )


def _figure(options: argparse.Namespace) -> int:
    try:
        from . import figure
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
    gemm.add_argument("--way", action="append", default=[], help="to sparse tensor cores; repeatable (default: all)")
    step = commands.add_parser("step", help="whole training steps of a GPT, sparse in turn with compiled dense ones")
    sizes = ["124M", "350M", "1.3B", "tiny"]
    step.add_argument("--model", choices=sizes, default="124M", help="(default: %(default)s)")
    step.add_argument("--steps", type=_count, default=100, help="timed ones of each variant (default: %(default)s)")
    step.add_argument(
        "--rounds", type=_count, default=5, help="turns that they are divided into (default: %(default)s)"
    )
    step.add_argument("--batch", type=_count, help="sequences a step (default: by model)")
    step.add_argument("--backend", action="append", default=[], help="of the sparse runs; repeatable (default: auto)")
    step.add_argument(
        "--compile",
        choices=["blocks", "model", "none"],
        default="model",
        help="what is compiled; model: head and cross-entropy too (default: %(default)s)",
    )
    step.add_argument("--mvue", action="store_true", help="also with weight gradients from 2:4 estimates")
    step.add_argument("--no-fp8", action="store_true", help="without the dense run in 8-bit floats")
    step.add_argument(
        "--optimizer",
        choices=["fused", "sparse"],
        default="fused",
        help="torch's fused AdamW for all, or sparsetrain.optim.SparseAdamW for sparse runs (default: %(default)s)",
    )
    step.add_argument("--peak-tflops", type=float, help="dense bfloat16 of this device (default: by its name)")
    for stand_in in (gemm, step):
        stand_in.add_argument("--stand-in", action="store_true", help="with the tests' stand-ins for sparse backends")
    commands.add_parser("model", help="the speed-up that arithmetic expects for each GPU; measures nothing")
    host = commands.add_parser("host", help="host time of an eager layer and of the engine's step over dense")
    host.add_argument("--repeats", type=_count, default=200, help="pairs of samples (default: %(default)s)")
    host.add_argument("--threads", type=_count, help="of torch (default: torch's own)")
    for limited in (gemm, linear, step):
        limited.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
        limited.add_argument("--seconds", type=float, help="begin nothing after so long")
    for stored in (search, every, gemm, linear, step, host):
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
