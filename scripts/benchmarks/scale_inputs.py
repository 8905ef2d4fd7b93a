"""Inputs of the model of sharded training: each is a flag with a default and a unit."""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

GPUS = (64, 128, 256, 512, 1024)
ROWS = (1024, 4096, 8192, 11008, 14336, 28672)
PRODUCTS = ("forward", "input-gradient", "weight-gradient")
REDUCE_BYTES = {"float32": 4, "bfloat16": 2}


def number(text: str) -> float:
    """Read a positive number, which may be a fraction such as 17/32."""
    if not 0 < (value := _value(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number: write it as 320, 6.5 or 17/32.")
    return value


def share(text: str) -> float:
    """Read a number from 0 to 1, which may be a fraction."""
    if not 0 <= (value := _value(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write a number from 0 to 1.")
    return value


def new_file(text: str) -> Path:
    """Read the name of a file that can be written, in a folder that is there or can be made."""
    path = Path(text)
    folder = next(one for one in path.absolute().parents if one.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: name a file in a folder that can.")
    return path


def _value(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ArithmeticError):
        return math.nan


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1.")
    return int(text)


def height(text: str) -> int:
    """Read the rows of a layer, a multiple of 4."""
    if not text.isdecimal() or int(text) < 4 or int(text) % 4:
        raise argparse.ArgumentTypeError(f"{text!r} is no height of a sparse layer: write a multiple of 4, as 11008.")
    return int(text)


def layer(text: str) -> tuple[int, int, int]:
    """Read copies, rows and columns of a kind of layer."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[1]) % 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no kind of layer: write copies, rows (a multiple of 4) and columns, as 40x5120x13824."
        )
    return int(parts[0]), int(parts[1]), int(parts[2])


@dataclass(frozen=True)
class Model:
    """A model, as far as its cost is concerned.

    Args:
        name: In the table.
        parameters: All of them.
        sparse_share: Of the parameters that are in 2:4 layers.
        rows: Different heights of these layers, if they are known.
    """

    name: str
    parameters: float
    sparse_share: float
    rows: tuple[int, ...] = ()


def of_layers(name: str, layers: Sequence[tuple[int, int, int]], dense: float) -> Model:
    """Return the model of ``(copies, rows, columns)`` of its sparse layers, and of the parameters outside of them."""
    sparse = sum(copies * rows * columns for copies, rows, columns in layers)
    return Model(name, sparse + dense, sparse / (sparse + dense), tuple(sorted({rows for _, rows, _ in layers})))


PRESETS = {
    # Llama 2 (arXiv 2307.09288): all linear layers of its blocks; embedding, head and norms stay dense
    "7b": of_layers(
        "7b", [(128, 4096, 4096), (64, 11008, 4096), (32, 4096, 11008)], 2 * 32000 * 4096 + (2 * 32 + 1) * 4096
    ),
    "70b": of_layers(
        "70b",
        [(160, 8192, 8192), (160, 1024, 8192), (160, 28672, 8192), (80, 8192, 28672)],
        2 * 32000 * 8192 + (2 * 80 + 1) * 8192,
    ),
}


def _flag(default: Any, read: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"type": read, "help": text, **more})


@dataclass(frozen=True)
class Inputs:
    """What the model assumes of machines, wires and products; every field is a flag of the same name."""

    gpus_per_node: int = _flag(8, count, "GPUs of a node, between which links count nothing")
    tokens: int = _flag(2048, count, "tokens of a GPU and step")
    node_bandwidth: float = _flag(320.0, number, "into a node from all others, GB/s; every byte enters a node once")
    overlap: float = _flag(1.0, share, "share of the shorter of compute and communication that the longer one hides")
    dense_tflops: float = _flag(450.0, number, "of dense bf16 products as they are reached, TFLOP/s")
    sparse_speed_up: float = _flag(1.3, number, "dense time over sparse time of one product")
    sparse_products: tuple[str, ...] = _flag(
        ("forward", "input-gradient"), str, "which of the three are sparse", choices=PRODUCTS, nargs="+"
    )
    masked_products: str = _flag(
        "dense", str, "of the masked wire: dense as they come, or packed after the gather", choices=["sparse", "dense"]
    )
    gathers: int = _flag(2, count, "all-gathers of a step: 2 with resharding after the forward, 1 without")
    gather_bytes: float = _flag(2.0, number, "bytes of a dense weight in a gather (2: bf16)")
    dense_wire: float = _flag(1.0, number, "bytes of a sparse layer's weight on the dense wire, of --gather-bytes")
    masked_wire: float = _flag(1.0, number, "the same on the masked wire (W⊙M with its zeros)")
    packed_wire: float = _flag(17 / 32, number, "the same on the packed wire (kept values, one byte for 16 weights)")
    reduce_dtype: str = _flag("float32", str, "dtype of the reduce-scatter of gradients", choices=[*REDUCE_BYTES])
    pack_bytes: float = _flag(
        6.5, number, "that masking and packing both operands after a dense gather moves, bytes a weight and step"
    )
    unpack_bytes: float = _flag(
        2.25, number, "that unpacking, transposing and packing from the packed wire moves, bytes a weight and step"
    )
    memory_bandwidth: float = _flag(3000.0, number, "of a GPU as these passes reach it, GB/s")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all inputs, and where the result goes."""
    add = parser.add_argument
    add("--model", action="append", choices=[*PRESETS], help="repeatable (default: all)")
    add(
        "--layer",
        action="append",
        type=layer,
        default=[],
        help="of your own model: copies x rows x columns; repeatable",
    )
    add("--parameters", type=number, help="of your own model, a number (default: those of its layers)")
    add("--sparse-share", type=share, help="share of the parameters that is in sparse layers (default: by the layers)")
    add("--gpus", type=count, nargs="+", default=[*GPUS], help=f"that share one copy (default: {_shown(GPUS)})")
    for one in fields(Inputs):
        text = f"{one.metadata['help']} (default: {_shown(one.default)})"
        add(f"--{one.name.replace('_', '-')}", default=one.default, **{**one.metadata, "help": text})
    add(
        "--rows", type=height, nargs="+", default=[*ROWS], help="heights for the table of shards (default: %(default)s)"
    )
    add("--csv", type=new_file, help="write the rows to this file")
    add("--json", action="store_true", help="print inputs and rows as JSON instead")


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:.5g}" if isinstance(default, float) else str(default)


def read_flags(options: argparse.Namespace) -> tuple[list[Model], list[int], Inputs]:
    """Return models, numbers of GPUs and inputs.

    Raises:
        ValueError: If flags do not go together.
    """
    inputs = Inputs(**{one.name: getattr(options, one.name) for one in fields(Inputs)})
    for gpus in options.gpus:
        if gpus % inputs.gpus_per_node or gpus < 2 * inputs.gpus_per_node:
            raise ValueError(
                f"--gpus is {gpus}: it must be a multiple of --gpus-per-node = {inputs.gpus_per_node}, and two nodes "
                "at least, because the model sees the network between nodes alone."
            )
    return models_of(options), options.gpus, inputs


def models_of(options: argparse.Namespace) -> list[Model]:
    """Return the presets that are asked for, or the user's own model."""
    given = options.sparse_share
    if not options.layer and options.parameters is None:
        chosen = [PRESETS[name] for name in options.model or PRESETS]
        return [
            Model(one.name, one.parameters, one.sparse_share if given is None else given, one.rows) for one in chosen
        ]
    if options.model:
        raise ValueError("--model goes with neither --layer nor --parameters: leave it out for your own model.")
    if not options.layer:
        if given is None:
            raise ValueError("--parameters needs --sparse-share or --layer, to know how many of them are sparse.")
        return [Model("own", options.parameters, given)]
    own = of_layers("own", options.layer, 0.0)
    if options.parameters is not None and options.parameters < own.parameters:
        raise ValueError(
            f"--parameters is {options.parameters:g}, but the layers alone have {own.parameters:g}: give all of them."
        )
    total = options.parameters or own.parameters
    return [Model("own", total, own.parameters / total if given is None else given, own.rows)]
