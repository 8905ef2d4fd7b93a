"""Launches of the gated activations."""

from compile_only import Case

from sparsetrain.kernels.gated_activation.triton_kernel import BLOCK, FLAT, WARPS, flat_kernel, tile_kernel

OPERANDS = ("grad", "gate", "up", "first", "second")


def flat(kind: str, backward: bool) -> Case:
    constants = {"KIND": kind, "BACKWARD": backward, "EMULATE_ROUNDING": False, "BLOCK": FLAT}
    signature = dict.fromkeys(OPERANDS, "*bf16") | {"count": "i32"} | dict.fromkeys(constants, "constexpr")
    name = f"{kind} {'backward' if backward else 'forward'} bf16"
    return Case(name, flat_kernel, signature, constants, FLAT, WARPS, (*OPERANDS, "count"))


def mixed(backward: bool) -> Case:
    """SwiGLU with gate and its gradient by columns, the rest by rows."""
    constants: dict[str, object] = {
        "KIND": "swiglu",
        "BACKWARD": backward,
        "EMULATE_ROUNDING": False,
        "ROWS": BLOCK[0],
        "COLUMNS": BLOCK[1],
    }
    strides: dict[str, str] = {}
    for name in OPERANDS:
        by_columns = name in ("gate", "first")
        strides |= {
            f"{name}_row": "constexpr" if by_columns else "i32",
            f"{name}_column": "i32" if by_columns else "constexpr",
        }
        constants[f"{name}_row" if by_columns else f"{name}_column"] = 1
    signature = dict.fromkeys(OPERANDS, "*bf16") | {"rows": "i32", "columns": "i32"} | strides
    signature |= dict.fromkeys(("KIND", "BACKWARD", "EMULATE_ROUNDING", "ROWS", "COLUMNS"), "constexpr")
    aligned = (*OPERANDS, "rows", "columns", *(name for name, kind in strides.items() if kind == "i32"))
    name = f"swiglu {'backward' if backward else 'forward'} bf16, gate by columns"
    return Case(name, tile_kernel, signature, constants, BLOCK[0] * BLOCK[1], WARPS, aligned)


CASES = [
    *(flat(kind, backward) for kind in ("swiglu", "geglu", "relu2") for backward in (False, True)),
    mixed(False),
    mixed(True),
]
