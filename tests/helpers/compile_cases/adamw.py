"""Launches of AdamW with masks."""

import torch
import triton.language as tl
from compile_only import Case

from sparsetrain.kernels.adamw.reference import RULES, Factors, Rule
from sparsetrain.kernels.adamw.triton_kernel import ALONE, BOTH, adamw_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = ("weight", "gradient", "average", "square", "code", "values", "meta", "values_t", "meta_t")
CONSTANTS = (
    "DTYPE", "RULE", "ZEROS", "MAXIMIZE", "FROM_END", "SIDES", "ALIGNED", "BY_HAND", "ROWS", "COLUMNS",
)  # fmt: skip


def signature(source: str, packed: bool) -> dict[str, str]:
    pointers = {}
    for name in COLUMNS:
        kind = source if name in COLUMNS[:4] else "i32" if packed and name.startswith("values") else "i16"
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


def case(source: str, rule: Rule, sides: int, zeros: bool = False) -> Case:
    rows, columns, warps = BOTH[DTYPES[source]] if sides == 2 else ALONE
    kinds = signature(source, sides > 0)
    numbers = (*Factors._fields, "decay", "clock", "tile_rows")
    return Case(
        f"adamw {source}, {rule}{', zeros' * zeros}, {('not packed', 'one side', 'both sides')[sides]} bf16",
        adamw_kernel,
        kinds,
        {
            "DTYPE": tl.bfloat16, "RULE": RULES.index(rule), "ZEROS": zeros, "MAXIMIZE": False, "FROM_END": False,
            "SIDES": sides, "ALIGNED": True, "BY_HAND": False, "ROWS": rows, "COLUMNS": columns,
        },
        elements=16 * rows * columns,
        warps=warps,
        aligned=tuple(name for name, kind in kinds.items() if kind != "constexpr" and name not in numbers),
    )  # fmt: skip


CASES = [
    case("fp32", "decay_gradient", 2),
    case("bf16", "decay_gradient", 2),
    case("fp32", "mask_gradient", 2, zeros=True),
    case("fp32", "decay_weight", 1),
    case("fp32", "decay_gradient", 0),
]
