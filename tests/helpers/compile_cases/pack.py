"""Launches of the packer."""

import torch
import triton.language as tl
from compile_only import Case

from sparsetrain.kernels.metadata_order import Order
from sparsetrain.kernels.pack.triton_kernel import ALONE, BOTH, pack_kernel
from sparsetrain.kernels.pack.triton_unpack import GROUPS, ROWS, WARPS, unpack_kernel

INPUTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = {"fp32": ("i64", tl.float32), "bf16": ("i32", tl.bfloat16), "fp16": ("i32", tl.float16)}
OPERANDS = ("weight", "code", "values", "meta", "table", "values_t", "meta_t", "table_t")
SIZES = ("tile_rows", "tile_columns", "word_rows", "word_columns", "blocks_of_sums")
CONSTANTS = (
    "DTYPE", "SEARCH", "STATISTICS", "FORWARD", "TRANSPOSED", "ORDER", "ORDER_T", "ALIGNED", "EMULATE_ROUNDING", "ROWS",
    "COLUMNS",
)  # fmt: skip


def signature(source: str, target: str, order: Order = Order.NATURAL) -> dict[str, str]:
    places = "i32" if order == Order.TABLE else "i16"
    kinds = {"weight": source, "code": "i16", "values": OUTPUTS[target][0], "meta": "i16", "table": places}
    pointers = {}
    for name in OPERANDS:
        pointers[f"{name}_base"] = "*" + kinds[name.removesuffix("_t")]
        pointers[f"{name}_offsets"] = "*i64"
    pointers["sums"] = "*fp32"
    return pointers | dict.fromkeys(SIZES, "i32") | {"stride": "i64"} | dict.fromkeys(CONSTANTS, "constexpr")


def case(
    source: str, target: str, search: bool = False, forward: bool = True, transposed: bool = True,
    statistics: bool = False, order: Order = Order.NATURAL,
) -> Case:  # fmt: skip
    rows, columns, warps = (BOTH if transposed else ALONE)[INPUTS[source]]
    sides = {(True, True): "both", (True, False): "one", (False, True): "transpose", (False, False): "none"}
    name = f"{'search and ' if search else ''}pack {source} to {target}, {sides[forward, transposed]}"
    name += ", measured" if statistics else ""
    name += "" if order == Order.NATURAL else f", {order.name.lower()}"
    return Case(
        name,
        pack_kernel,
        signature(source, target, order),
        {
            "DTYPE": OUTPUTS[target][1], "SEARCH": search, "STATISTICS": statistics, "FORWARD": forward,
            "TRANSPOSED": transposed, "ORDER": int(order), "ORDER_T": int(order), "ALIGNED": True,
            "EMULATE_ROUNDING": False, "ROWS": rows, "COLUMNS": columns,
        },
        elements=16 * rows * columns,
        warps=warps,
        aligned=tuple(
            name for name in signature(source, target) if name not in (*CONSTANTS, "blocks_of_sums")
        ),
    )  # fmt: skip


CASES = [
    case("bf16", "bf16", search=True),
    case("fp32", "bf16", search=True),
    case("fp32", "fp32", search=True),
    case("fp16", "fp16", search=True, transposed=False),
    case("bf16", "bf16", search=True, statistics=True, order=Order.CUTLASS_SM90_4),
    case("fp32", "bf16", search=True, statistics=True, order=Order.TABLE),
    case("fp32", "bf16", search=True, forward=False, transposed=False, statistics=True),
    case("fp32", "bf16"),
    case("bf16", "bf16", order=Order.CUSPARSELT_SM80),
    case("fp32", "bf16", forward=False, order=Order.CUTLASS_SM90_2),
    *(
        Case(
            f"unpack {dtype}",
            unpack_kernel,
            {"pairs": f"*{pair}", "meta": "*i16", "dense": f"*{entry}", "rows": "i32", "groups": "i32", "words": "i32",
             "BITS": "constexpr", "ROWS": "constexpr", "GROUPS": "constexpr"},
            {"BITS": bits, "ROWS": ROWS, "GROUPS": GROUPS},
            elements=4 * ROWS * GROUPS,
            warps=WARPS,
            aligned=("pairs", "meta", "dense", "groups", "words"),
        )
        for dtype, pair, entry, bits in (("bf16", "i32", "i16", 16), ("fp32", "i64", "i32", 32))
    ),
]  # fmt: skip
