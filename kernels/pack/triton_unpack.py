"""Unpacking packed rows as a Triton kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import join_columns
from ..launch import on_device_of
from .triton_sides import PAIRS

ROWS, GROUPS, WARPS = 4, 256, 4  # of one program: rows, fours of columns


def unpack_into(values: Tensor, meta: Tensor, dense: Tensor) -> None:
    """Unpack packed rows.

    Args:
        values: float32, float16 or bfloat16 ``[R, C/2]``, contiguous.
        meta: int16 ``[R, ceil(C/16)]``, contiguous.
        dense: The values' dtype, ``[R, C]``, contiguous; overwritten.
    """
    rows, groups = dense.shape[0], dense.shape[1] // 4
    entries = torch.int32 if values.dtype == torch.float32 else torch.int16
    pairs, written = values.view(PAIRS[values.dtype]), dense.view(entries)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(groups, GROUPS),)
    with on_device_of(values):
        unpack_kernel[grid](
            pairs, meta, written, rows, groups, meta.shape[1], BITS=8 * values.element_size(), ROWS=ROWS,
            GROUPS=GROUPS, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def unpack_kernel(
    pairs, meta, dense, rows, groups, words, BITS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Write ROWS × GROUPS fours of columns of ``dense`` ``[rows, 4·groups]``."""
    blocks = tl.cdiv(groups, GROUPS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    left = (tl.program_id(0) % blocks) * GROUPS
    group = left + tl.arange(0, GROUPS)[None, :]
    inside = (row < rows) & (group < groups)
    pair = tl.load(pairs + row * groups + group, mask=inside, other=0)
    word = tl.load(meta + row * words + group // 4, mask=inside, other=0).to(tl.int32)
    nibble = (word >> (4 * (group % 4))) & 15  # [ROWS, GROUPS], as the pairs
    first, last = pair.to(dense.dtype.element_ty), (pair >> BITS).to(dense.dtype.element_ty)
    result = join_columns(
        entry_at(0, nibble, first, last), entry_at(1, nibble, first, last), entry_at(2, nibble, first, last),
        entry_at(3, nibble, first, last), ROWS, GROUPS,
    )  # fmt: skip
    column = left * 4 + tl.arange(0, 4 * GROUPS)[None, :]
    tl.store(dense + row * 4 * groups + column, result, mask=(row < rows) & (column < 4 * groups))


@triton.jit
def entry_at(position: tl.constexpr, nibble, first, last):
    """The kept entry at a position, or 0, by a nibble of metadata."""
    return tl.where((nibble & 3) == position, first, tl.where((nibble >> 2) == position, last, 0).to(first.dtype))
