"""Masked decay and re-masking as Triton kernels: several tensors at a time, no mask in memory."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import join_columns, load_code, member, split_columns
from ..launch import are_aligned, groups_of_equal_layout, members, on_device_of

BLOCK = (1, 256)  # tiles of one program: rows, columns
WARPS = 4


def decay_in_place(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], codes: Sequence[Tensor], decay: Tensor
) -> None:
    """Add ``decay * (1 - mask) * weight`` to gradients; tensors of equal layout share one launch.

    Args:
        gradients: ``[O, I]`` each, columns contiguous, rows at any stride; changed.
        weights: The same shapes; any strides of rows.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        decay: float32, one element, on their device.
    """
    _launch(gradients, weights, codes, decay, add=True)


def mask_in_place(tensors: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    """Write zeros into pruned entries; tensors of equal layout share one launch.

    Args:
        tensors: ``[O, I]`` each, columns contiguous, rows at any stride; changed.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
    """
    _launch(tensors, tensors, codes, None, add=False)


def _launch(
    targets: Sequence[Tensor], weights: Sequence[Tensor], codes: Sequence[Tensor], decay: Tensor | None, add: bool
) -> None:
    for group in groups_of_equal_layout(targets, weights, codes):
        changed, sources, masks = ([column[i] for i in group] for column in (targets, weights, codes))
        tile_rows, tile_columns = masks[0].shape
        grid = (triton.cdiv(tile_rows, BLOCK[0]) * triton.cdiv(tile_columns, BLOCK[1]), len(group))
        with on_device_of(changed[0]):
            masked_update_kernel[grid](
                *members(changed), *members(sources), *members(masks), masks[0] if decay is None else decay, tile_rows,
                tile_columns, changed[0].stride(0), sources[0].stride(0), ADD=add,
                ALIGNED=are_aligned(changed, sources, masks), ROWS=BLOCK[0], COLUMNS=BLOCK[1], num_warps=WARPS,
                enable_fp_fusion=False,  # the reference rounds the product
            )  # fmt: skip


@triton.jit
def masked_update_kernel(
    target_base, target_offsets, weight_base, weight_offsets, code_base, code_offsets, decay, tile_rows, tile_columns,
    target_stride, weight_stride, ADD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Update ROWS × COLUMNS tiles of the program's target: add the masked decay if ADD, else zero what is pruned."""
    tensor = tl.program_id(1)
    blocks = tl.cdiv(tile_columns, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    left = (tl.program_id(0) % blocks) * COLUMNS
    column = left + tl.arange(0, COLUMNS)[None, :]
    inside = (row < tile_rows) & (column < tile_columns)
    code = load_code(member(code_base, code_offsets, tensor, ALIGNED) + row * tile_columns + column, inside)
    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)
    targets = member(target_base, target_offsets, tensor, ALIGNED) + row * 4 * target_stride + element
    weights = member(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * weight_stride + element
    for line in tl.static_range(4):
        target = tl.load(targets + line * target_stride, mask=within, other=0.0)
        nibble = code >> (4 * line)
        if ADD:
            weight = tl.load(weights + line * weight_stride, mask=within, other=0.0).to(tl.float32)
            w0, w1, w2, w3 = split_columns(weight, ROWS, COLUMNS)
            pruned = join_columns(
                tl.where((nibble & 1) != 0, 0.0, w0),
                tl.where((nibble & 2) != 0, 0.0, w1),
                tl.where((nibble & 4) != 0, 0.0, w2),
                tl.where((nibble & 8) != 0, 0.0, w3),
                ROWS, COLUMNS,
            )  # fmt: skip
            result = target.to(tl.float32) + pruned * tl.load(decay)
        else:
            t0, t1, t2, t3 = split_columns(target, ROWS, COLUMNS)
            zero = tl.zeros((ROWS, COLUMNS), target.dtype)
            result = join_columns(
                tl.where((nibble & 1) != 0, t0, zero),
                tl.where((nibble & 2) != 0, t1, zero),
                tl.where((nibble & 4) != 0, t2, zero),
                tl.where((nibble & 8) != 0, t3, zero),
                ROWS, COLUMNS,
            )  # fmt: skip
        tl.store(targets + line * target_stride, result.to(target.dtype), mask=within)
