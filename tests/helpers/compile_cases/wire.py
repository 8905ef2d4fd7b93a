"""Launches of wires: packed into operands, made and read."""

import torch
import triton.language as tl
from compile_only import Case

from sparsetrain.kernels.metadata_order import Order
from sparsetrain.kernels.wire.triton_dense import (
    BLOCKS,
    FLAT,
    WARPS,
    codes_kernel,
    from_wire_kernel,
    numbers_kernel,
    to_wire_kernel,
)
from sparsetrain.kernels.wire.triton_kernel import ALONE, BOTH, pack_wire_kernel

DTYPES = {  # torch's, Triton's, of a pair, of an entry
    "fp32": (torch.float32, tl.float32, "i64", "i32"),
    "bf16": (torch.bfloat16, tl.bfloat16, "i32", "i16"),
    "fp16": (torch.float16, tl.float16, "i32", "i16"),
}
OPERANDS = ("kept", "number", "patterns", "values", "meta", "table", "values_t", "meta_t", "table_t")
SIDES = {"both": (True, True), "one": (True, False), "transpose": (False, True)}


def pack(dtype: str, sides: str, order: Order = Order.NATURAL) -> Case:
    known, entry, pair, _ = DTYPES[dtype]
    rows, columns, warps = (ALONE if sides == "one" else BOTH)[known]
    kinds = {"kept": pair, "number": "u8", "values": pair, "table": "i32" if order == Order.TABLE else "i16"}
    signature = {}
    for name in OPERANDS:
        if name == "patterns":
            signature[name] = "*i64"
        else:
            signature |= {f"{name}_base": "*" + kinds.get(name.removesuffix("_t"), "i16"), f"{name}_offsets": "*i64"}
    signature |= dict.fromkeys(("tile_rows", "tile_columns", "word_rows", "word_columns"), "i32")
    constants = {
        "DTYPE": entry, "FORWARD": SIDES[sides][0], "TRANSPOSED": SIDES[sides][1], "ORDER": int(order),
        "ORDER_T": int(order), "ALIGNED": True, "ROWS": rows, "COLUMNS": columns,
    }  # fmt: skip
    name = f"pack wire {dtype}, {sides}{'' if order == Order.NATURAL else f', {order.name.lower()}'}"
    return Case(
        name, pack_wire_kernel, signature | dict.fromkeys(constants, "constexpr"), constants,
        elements=16 * rows * columns, warps=warps, aligned=tuple(signature),
    )  # fmt: skip


def make(source: str, target: str) -> Case:
    rows, columns, warps = BLOCKS[DTYPES[source][0]]
    entry = DTYPES[source][3] if source == target else source
    signature = {"weight": f"*{entry}", "codes": "*i16", "pairs": f"*{DTYPES[target][2]}", "numbers": "*u8"}
    signature |= dict.fromkeys(("tile_rows", "written_rows", "tile_columns"), "i32") | {"stride": "i64"}
    constants = {"DTYPE": DTYPES[target][1], "EMULATE_ROUNDING": False, "ROWS": rows, "COLUMNS": columns}
    return Case(
        f"wire from {source} to {target}", to_wire_kernel, signature | dict.fromkeys(constants, "constexpr"), constants,
        elements=16 * rows * columns, warps=warps,
        aligned=tuple(name for name in signature if name not in ("tile_rows", "written_rows")),
    )  # fmt: skip


def read(dtype: str) -> Case:
    rows, columns, warps = BLOCKS[DTYPES[dtype][0]]
    signature = {"pairs": f"*{DTYPES[dtype][2]}", "numbers": "*u8", "patterns": "*i64", "dense": f"*{DTYPES[dtype][3]}"}
    signature |= dict.fromkeys(("tile_rows", "tile_columns"), "i32")
    constants = {"DTYPE": DTYPES[dtype][1], "ROWS": rows, "COLUMNS": columns}
    return Case(
        f"dense from wire {dtype}", from_wire_kernel, signature | dict.fromkeys(constants, "constexpr"), constants,
        elements=16 * rows * columns, warps=warps, aligned=tuple(name for name in signature if name != "tile_rows"),
        vector_bits=64,  # the dense rows, which are written, have the widest
    )  # fmt: skip


CASES = [
    pack("bf16", "both"),
    pack("bf16", "both", Order.CUTLASS_SM90_4),
    pack("bf16", "both", Order.TABLE),
    pack("fp32", "both"),
    pack("bf16", "one", Order.CUTLASS_SM90_4),
    pack("bf16", "transpose", Order.CUTLASS_SM90_4),
    make("fp32", "bf16"),
    make("bf16", "bf16"),
    make("fp32", "fp32"),
    read("bf16"),
    read("fp32"),
    Case(
        "codes of numbers", codes_kernel,
        {"numbers": "*u8", "patterns": "*i64", "codes": "*i16", "tiles": "i32", "BLOCK": "constexpr"},
        {"BLOCK": FLAT}, elements=FLAT, warps=WARPS, aligned=("numbers", "patterns", "codes", "tiles"), vector_bits=64,
    ),
    Case(
        "numbers of codes", numbers_kernel,
        {"codes": "*i16", "numbers": "*u8", "tiles": "i32", "BLOCK": "constexpr"},
        {"BLOCK": FLAT}, elements=FLAT, warps=WARPS, aligned=("codes", "numbers", "tiles"),
    ),
]  # fmt: skip
