"""Launches of the masked updates."""

from compile_only import Case

from sparsetrain.kernels.masked_update.triton_kernel import BLOCK, WARPS, masked_update_kernel


def signature(dtype: str, add: bool) -> dict[str, str]:
    return {
        "target_base": f"*{dtype}", "target_offsets": "*i64", "weight_base": f"*{dtype}", "weight_offsets": "*i64",
        "code_base": "*i16", "code_offsets": "*i64", "decay": "*fp32" if add else "*i16", "numbers": "*i64",
        "clock": "i64", "tile_rows": "i32", "tile_columns": "i32", "target_stride": "i64", "weight_stride": "i64",
        "ADD": "constexpr", "AT_RANDOM": "constexpr", "ALIGNED": "constexpr", "ROWS": "constexpr",
        "COLUMNS": "constexpr",
    }  # fmt: skip


CASES = [
    Case(
        f"{'masked decay' if add else 'apply mask'} {dtype}",
        masked_update_kernel,
        signature(dtype, add),
        {"ADD": add, "AT_RANDOM": add and dtype != "fp32", "ALIGNED": True, "ROWS": BLOCK[0], "COLUMNS": BLOCK[1]},
        elements=16 * BLOCK[0] * BLOCK[1],
        warps=WARPS,
        aligned=tuple(
            name
            for name, kind in signature(dtype, add).items()
            if kind != "constexpr" and name not in ("tile_rows", "clock")
        ),
    )
    for dtype, add in (("fp32", True), ("bf16", True), ("fp16", True), ("fp32", False), ("bf16", False))
]
