"""Launches of the mask search."""

from compile_only import Case

from sparsetrain.kernels.mask_search.triton_kernel import WARPS, WIDE, search_kernel

KINDS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
POINTERS = (
    "score_base", "score_offsets", "code_base", "code_offsets", "mask_base", "mask_offsets", "tile_columns", "stride"
)  # fmt: skip


def signature(dtype: str) -> dict[str, str]:
    return {
        "score_base": f"*{dtype}", "score_offsets": "*i64", "code_base": "*i16", "code_offsets": "*i64",
        "mask_base": "*i32", "mask_offsets": "*i64", "tile_rows": "i32", "tile_columns": "i32", "stride": "i64",
        "MAGNITUDE": "constexpr", "ALIGNED": "constexpr", "MASK": "constexpr", "ROWS": "constexpr",
        "COLUMNS": "constexpr",
    }  # fmt: skip


CASES = [
    Case(
        f"search {KINDS[dtype]} to {'byte mask' if mask else 'codes'}{'' if magnitude else ', signed'}",
        search_kernel,
        signature(dtype),
        {"MAGNITUDE": magnitude, "ALIGNED": True, "MASK": mask, "ROWS": WIDE[0], "COLUMNS": WIDE[1]},
        elements=16 * WIDE[0] * WIDE[1],
        warps=WARPS,
        aligned=POINTERS,
    )
    for dtype, magnitude, mask in (
        ("bf16", True, False), ("bf16", True, True), ("fp16", True, False), ("fp32", True, False),
        ("fp32", True, True), ("fp32", False, False),
    )
]  # fmt: skip
