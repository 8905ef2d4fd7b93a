"""Launches of the packer."""

import torch
import triton.language as tl
from compile_only import Case

from sparsetrain.kernels.pack.triton_kernel import ALONE, BOTH, pack_kernel, unpack_kernel

INPUTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTPUTS = {"fp32": ("i64", tl.float32), "bf16": ("i32", tl.bfloat16), "fp16": ("i32", tl.float16)}
OPERANDS = ("weight", "code", "values", "meta", "values_t", "meta_t")
SIZES = ("tile_rows", "tile_columns", "word_rows", "word_columns")


def signature(source: str, target: str) -> dict[str, str]:
    kinds = {"weight": source, "code": "i16", "values": OUTPUTS[target][0], "meta": "i16"}
    pointers = {}
    for name in OPERANDS:
        pointers[f"{name}_base"] = "*" + kinds[name.removesuffix("_t")]
        pointers[f"{name}_offsets"] = "*i64"
    constants = ("DTYPE", "SEARCH", "TRANSPOSED", "ALIGNED", "BY_HAND", "ROWS", "COLUMNS")
    return pointers | dict.fromkeys(SIZES, "i32") | {"stride": "i64"} | dict.fromkeys(constants, "constexpr")


def case(source: str, target: str, search: bool, transposed: bool) -> Case:
    rows, columns, warps = BOTH[INPUTS[source]] if transposed else ALONE
    return Case(
        f"{'search and ' if search else ''}pack {source} to {target}, {'both' if transposed else 'one'}",
        pack_kernel,
        signature(source, target),
        {
            "DTYPE": OUTPUTS[target][1], "SEARCH": search, "TRANSPOSED": transposed, "ALIGNED": True,
            "BY_HAND": False, "ROWS": rows, "COLUMNS": columns,
        },
        elements=16 * rows * columns,
        warps=warps,
        aligned=tuple(name for name in signature(source, target) if name.islower()),
    )  # fmt: skip


CASES = [
    case("bf16", "bf16", True, True),
    case("fp32", "bf16", True, True),
    case("fp16", "fp16", True, True),
    case("fp32", "fp32", True, True),
    case("fp32", "bf16", False, True),
    case("bf16", "bf16", False, True),
    case("bf16", "bf16", True, False),
    case("fp32", "bf16", False, False),
    *(
        Case(
            f"unpack {dtype}",
            unpack_kernel,
            {"pairs": f"*{pair}", "meta": "*i16", "dense": f"*{entry}", "rows": "i32", "groups": "i32", "words": "i32",
             "BITS": "constexpr", "ROWS": "constexpr", "GROUPS": "constexpr"},
            {"BITS": bits, "ROWS": ALONE[0], "GROUPS": 4 * ALONE[1]},
            elements=16 * ALONE[0] * ALONE[1],
            warps=ALONE[2],
            aligned=("pairs", "meta", "dense", "groups", "words"),
        )
        for dtype, pair, entry, bits in (("bf16", "i32", "i16", 16), ("fp32", "i64", "i32", 32))
    ),
]  # fmt: skip
