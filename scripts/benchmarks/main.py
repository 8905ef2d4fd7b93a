"""``scripts/bench``: benchmarks by name."""

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .command_line import QUICK_SECONDS, command_line

if TYPE_CHECKING:
    from sparsetrain.backends import Backend


def main() -> int:
    """Run a benchmark and return the exit code: 2 if it cannot run here."""
    parser = command_line()
    options = parser.parse_args()
    run = {
        "gemm": _grid,
        "linear": _grid,
        "step": _step,
        "figure": _figure,
        "kernels": _kernels,
        "model": _model,
        "scale-model": _scale_model,
        "host": _host,
        "sharded": _sharded,
    }
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


def _sharded(options: argparse.Namespace) -> int:
    from . import sharded

    size = sharded.Size(options.blocks, options.width, options.tokens)
    return sharded.run(size, options.ranks, options.repeats, options.device, options.csv)


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


def _scale_model(options: argparse.Namespace) -> int:
    from . import scale_model

    return scale_model.run(options)


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


if __name__ == "__main__":
    sys.exit(main())
