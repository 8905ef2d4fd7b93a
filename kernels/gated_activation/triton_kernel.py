"""Gated activations as Triton kernels, for operands whose rows or whose columns are contiguous, in any mixture."""

import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import rounded
from ..launch import interpreted, on_device_of

FLAT, WARPS = 1024, 4  # entries of a program where all operands lie alike
BLOCK = (64, 64)  # rows, columns where they do not


def forward_into(gate: Tensor, up: Tensor | None, kind: str, result: Tensor) -> None:
    """Compute the activation.

    Args:
        gate: float32, float16 or bfloat16 ``[T, H]``, rows or columns contiguous.
        up: The same shape, its own layout; None for ``"relu2"``.
        kind: See :func:`.reference.activate`.
        result: ``[T, H]``, rows or columns contiguous; overwritten.
    """
    _launch(result, gate, gate if up is None else up, result, result, kind, backward=False)


def backward_into(
    grad: Tensor, gate: Tensor, up: Tensor | None, kind: str, grad_gate: Tensor, grad_up: Tensor | None
) -> None:
    """Compute the gradients of ``gate`` and, if there is one, ``up``; layouts as in :func:`forward_into`."""
    other = grad_gate if grad_up is None else grad_up
    _launch(grad, gate, gate if up is None else up, grad_gate, other, kind, backward=True)


def _launch(grad: Tensor, gate: Tensor, up: Tensor, first: Tensor, second: Tensor, kind: str, backward: bool) -> None:
    rows, columns = gate.shape
    strides = {tensor.stride() for tensor in (grad, gate, up, first, second)}
    dense = len(strides) == 1 and sorted(gate.stride()) in ([1, rows], [1, columns])
    options = {
        "KIND": kind, "BACKWARD": backward, "EMULATE_ROUNDING": interpreted(), "num_warps": WARPS,
        "enable_fp_fusion": False,
    }  # fmt: skip
    with on_device_of(gate):
        if dense and gate.numel() == _extent(gate):
            grid = (triton.cdiv(gate.numel(), FLAT),)
            flat_kernel[grid](grad, gate, up, first, second, gate.numel(), BLOCK=FLAT, **options)
        else:
            blocks = triton.cdiv(rows, BLOCK[0]) * triton.cdiv(columns, BLOCK[1])
            tile_kernel[(blocks,)](
                grad, gate, up, first, second, rows, columns, *grad.stride(), *gate.stride(), *up.stride(),
                *first.stride(), *second.stride(), ROWS=BLOCK[0], COLUMNS=BLOCK[1], **options,
            )  # fmt: skip


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@triton.jit
def flat_kernel(
    grad, gate, up, first, second, count, KIND: tl.constexpr, BACKWARD: tl.constexpr, EMULATE_ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK entries of operands that all lie alike, whichever dimension comes first."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    entries(
        grad + place, gate + place, up + place, first + place, second + place, inside, KIND, BACKWARD, EMULATE_ROUNDING
    )  # fmt: skip


@triton.jit
def tile_kernel(
    grad, gate, up, first, second, rows, columns, grad_row, grad_column, gate_row, gate_column, up_row, up_column,
    first_row, first_column, second_row, second_column, KIND: tl.constexpr, BACKWARD: tl.constexpr,
    EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS × COLUMNS entries; every operand is read and written along its own contiguous dimension."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    entries(
        grad + row * grad_row + column * grad_column, gate + row * gate_row + column * gate_column,
        up + row * up_row + column * up_column, first + row * first_row + column * first_column,
        second + row * second_row + column * second_column, inside, KIND, BACKWARD, EMULATE_ROUNDING,
    )  # fmt: skip


@triton.jit
def entries(
    grad, gate, up, first, second, inside, KIND: tl.constexpr, BACKWARD: tl.constexpr, EMULATE_ROUNDING: tl.constexpr
):  # fmt: skip
    """Load what the kind needs, compute in float32, round once."""
    x = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    if KIND == "relu2":
        value = tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # NaN stays
        slope = 2.0 * value
        value = value * value
        gated = 1.0
    else:
        if KIND == "swiglu":
            sigmoid = 1.0 / (1.0 + tl.exp(-x))
            slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
            value = x * sigmoid
        else:
            share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
            value = x * share
        gated = tl.load(up, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        tl.store(first, rounded(g * gated * slope, first.dtype.element_ty, EMULATE_ROUNDING), mask=inside)
        if KIND != "relu2":
            tl.store(second, rounded(g * value, second.dtype.element_ty, EMULATE_ROUNDING), mask=inside)
    else:
        tl.store(first, rounded(value * gated, first.dtype.element_ty, EMULATE_ROUNDING), mask=inside)
