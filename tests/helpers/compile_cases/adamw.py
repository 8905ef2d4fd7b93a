"""Launches of AdamW with masks."""

import triton.language as tl
from compile_only import Case

from sparsetrain.kernels.adamw.reference import RULES, Factors, Rule
from sparsetrain.kernels.adamw.triton_kernel import ALONE, BOTH, adamw_kernel
from sparsetrain.kernels.metadata_order import Order

COLUMNS = (
    "weight", "gradient", "average", "square", "code", "values", "meta", "table", "values_t", "meta_t", "table_t",
)  # fmt: skip
CONSTANTS = (
    "DTYPE", "RULE", "ZEROS", "MAXIMIZE", "FROM_END", "FORWARD", "TRANSPOSED", "ORDER", "ORDER_T", "ALIGNED",
    "EMULATE_ROUNDING", "ROWS", "COLUMNS",
)  # fmt: skip


def signature(source: str, packed: bool, tabled: bool) -> dict[str, str]:
    pointers = {}
    for name in COLUMNS:
        kind = source if name in COLUMNS[:4] else "i16"
        if (packed and name.startswith("values")) or (tabled and name.startswith("table")):
            kind = "i32"
        pointers[f"{name}_base"] = "*" + kind
        pointers[f"{name}_offsets"] = "*i64"
    return (
        pointers
        | {"numbers": "*i64", "clock": "i64"}
        | dict.fromkeys((*Factors._fields, "decay"), "fp32")
        | dict.fromkeys(("tile_rows", "tile_columns", "word_rows", "word_columns"), "i32")
        | dict.fromkeys(("weight_stride", "gradient_stride", "moment_stride"), "i64")
        | dict.fromkeys(CONSTANTS, "constexpr")
    )


def case(source: str, rule: Rule, sides: str, zeros: bool = False, order: Order = Order.NATURAL) -> Case:
    rows, columns, warps = ALONE if sides in ("W", "none") else BOTH
    kinds = signature(source, sides != "none", order == Order.TABLE)
    numbers = (*Factors._fields, "decay", "clock", "tile_rows")
    return Case(
        f"adamw {source}, {rule}{', zeros' * zeros}, packed {sides}, {order.name}",
        adamw_kernel,
        kinds,
        {
            "DTYPE": tl.bfloat16, "RULE": RULES.index(rule), "ZEROS": zeros, "MAXIMIZE": False, "FROM_END": False,
            "FORWARD": sides in ("W", "both"), "TRANSPOSED": sides == "both", "ORDER": int(order),
            "ORDER_T": int(order), "ALIGNED": True, "EMULATE_ROUNDING": False, "ROWS": rows, "COLUMNS": columns,
        },
        elements=16 * rows * columns,
        warps=warps,
        aligned=tuple(name for name, kind in kinds.items() if kind != "constexpr" and name not in numbers),
    )  # fmt: skip


CASES = [
    case("fp32", "decay_gradient", "both", order=Order.CUTLASS_SM90_4),
    case("bf16", "decay_gradient", "both", order=Order.CUTLASS_SM90_4),
    case("fp32", "mask_gradient", "both", zeros=True, order=Order.TABLE),
    case("fp32", "decay_weight", "W"),
    case("fp32", "decay_gradient", "none"),
]
