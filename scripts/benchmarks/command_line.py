"""The command line of ``scripts/bench``: what each benchmark can be told."""

import argparse
from pathlib import Path

from . import scale_inputs

QUICK_SECONDS = 100.0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of all benchmarks."""
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
    _products(gemm, linear)
    step = commands.add_parser("step", help="whole training steps of a GPT, sparse in turn with compiled dense ones")
    _step(step)
    for shaped in (every, gemm, linear):
        text = "(O, I) of the weight, such as 4096x14336; repeatable (default: several)"
        shaped.add_argument("--shape", action="append", type=_shape, default=[], help=text)
    gemm.add_argument("--way", action="append", default=[], help="to sparse tensor cores; repeatable (default: all)")
    for stand_in in (gemm, step):
        stand_in.add_argument("--stand-in", action="store_true", help="with the tests' stand-ins for sparse backends")
    commands.add_parser("model", help="the speed-up that arithmetic expects for each GPU; measures nothing")
    scale = "the cost of sharded training on many GPUs that arithmetic expects; measures nothing"
    scale_inputs.add_flags(commands.add_parser("scale-model", help=scale))
    host = commands.add_parser("host", help="host time of an eager layer and of the engine's step over dense")
    host.add_argument("--repeats", type=_count, default=200, help="pairs of samples (default: %(default)s)")
    host.add_argument("--threads", type=_count, help="of torch (default: torch's own)")
    sharded = commands.add_parser("sharded", help="a step under FSDP2, sparse by each wire in turn with dense")
    _sharded(sharded)
    for limited in (gemm, linear, step):
        limited.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: %(default)s)")
        limited.add_argument("--seconds", type=float, help="begin nothing after so long")
    for stored in (search, every, gemm, linear, step, host, sharded):
        stored.add_argument("--csv", type=scale_inputs.new_file, help="append the rows to this file")
    _figure(commands.add_parser("figure", help="draw the ratio to dense over tokens from the CSV of gemm or linear"))
    return parser


def _sharded(sharded: argparse.ArgumentParser) -> None:
    for name, value, text in (
        ("--ranks", 2, "processes, one a GPU"),
        ("--blocks", 4, "of two linear layers"),
        ("--width", 256, "features of a block"),
        ("--tokens", 256, "in the batch of a rank"),
        ("--repeats", 20, "pairs of steps"),
    ):
        sharded.add_argument(name, type=_count, default=value, help=f"{text} (default: %(default)s)")
    sharded.add_argument("--device", choices=["cuda", "cpu"], default="cpu", help="(default: %(default)s)")


def _products(gemm: argparse.ArgumentParser, linear: argparse.ArgumentParser) -> None:
    linear.add_argument(
        "--micro-batches", type=_count, default=1, help="of an optimizer step, which repacks (default: %(default)s)"
    )
    for grid in (gemm, linear):
        grid.add_argument("--tokens", action="append", type=_count, default=[], help="repeatable (default: 512…32768)")
        grid.add_argument("--dtype", action="append", choices=["bfloat16", "float16"], default=[], help="repeatable")
        grid.add_argument("--quick", action="store_true", help=f"what an H200 does in {QUICK_SECONDS:.0f} seconds")
        grid.add_argument("--repeats", type=_count, help="timed calls of each (default: 30, with --quick 10)")


def _step(step: argparse.ArgumentParser) -> None:
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


def _figure(figure: argparse.ArgumentParser) -> None:
    figure.add_argument("--csv", type=Path, required=True, help="what gemm or linear wrote")
    figure.add_argument("--out", type=Path, required=True, help="a .png, .svg or .pdf")
    figure.add_argument("--of", default="gemm forward", help="or linear step, linear forward… (default: %(default)s)")
    figure.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")


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
