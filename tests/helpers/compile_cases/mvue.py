"""Launches of the unbiased estimate."""

import torch
import triton.language as tl
from compile_only import Case

from sparsetrain.kernels.mvue.triton_kernel import BLOCKS, mvue_kernel

KINDS = {
    "bf16": (torch.bfloat16, tl.bfloat16),
    "fp16": (torch.float16, tl.float16),
    "fp32": (torch.float32, tl.float32),
}


def case(kind: str, exact: bool) -> Case:
    dtype, entry = KINDS[kind]
    words, features, warps = BLOCKS[dtype]
    return Case(
        f"mvue {kind}, {'exact' if exact else 'two draws'}",
        mvue_kernel,
        {
            "gradient": f"*{kind}", "counter": "*i64", "values": f"*{kind}", "meta": "*i16", "seed": "i64",
            "layer": "i32", "quads": "i32", "words": "i32", "features": "i32", "stride": "i64", "DTYPE": "constexpr",
            "EXACT": "constexpr", "EMULATE_ROUNDING": "constexpr", "WORDS": "constexpr", "FEATURES": "constexpr",
        },
        {"DTYPE": entry, "EXACT": exact, "EMULATE_ROUNDING": False, "WORDS": words, "FEATURES": features},
        elements=16 * words * features,
        warps=warps,
        vector_bits=128 if kind == "fp32" else 64,  # four entries of 16 rows each in flight
        aligned=("gradient", "counter", "values", "meta", "quads", "words", "features", "stride"),
    )  # fmt: skip


CASES = [case("bf16", True), case("fp16", True), case("fp32", True), case("bf16", False)]
