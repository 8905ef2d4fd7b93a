"""Launches of the statistics."""

from compile_only import Case

from sparsetrain.kernels.statistics.triton_kernel import BLOCK, WARPS, statistics_kernel


def signature(dtype: str) -> dict[str, str]:
    return {
        "weight_base": f"*{dtype}", "weight_offsets": "*i64", "code_base": "*i16", "code_offsets": "*i64",
        "previous_base": "*i16", "previous_offsets": "*i64", "sums": "*fp32", "counts": "*i32", "tile_rows": "i32",
        "tile_columns": "i32", "stride": "i64", "ALIGNED": "constexpr", "ROWS": "constexpr", "COLUMNS": "constexpr",
    }  # fmt: skip


CASES = [
    Case(
        f"statistics {dtype}",
        statistics_kernel,
        signature(dtype),
        {"ALIGNED": True, "ROWS": BLOCK[0], "COLUMNS": BLOCK[1]},
        elements=16 * BLOCK[0] * BLOCK[1],
        warps=WARPS,
        aligned=tuple(name for name in signature(dtype) if name not in ("ALIGNED", "ROWS", "COLUMNS", "tile_rows")),
    )
    for dtype in ("bf16", "fp32")
]
