"""Statistics of weights and masks as a Triton kernel: partial sums of every block, no atomics, so always the same."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import count_bits, load_code, split_columns, tensor_pointer, tiles_of_program
from ..launch import on_device_of
from ..plan import are_aligned, groups_of_equal_layout
from ..pointer_tables import members, table

BLOCK = (4, 128)  # tiles of one program: rows, columns
WARPS = 4


def partial_sums(
    weights: Sequence[Tensor], codes: Sequence[Tensor], previous: Sequence[Tensor], statistics: Tensor
) -> None:
    """Measure several weights; weights of equal layout share one launch.

    Args:
        weights: float32, float16 or bfloat16 ``[O, I]`` each, columns contiguous, rows at any stride.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        previous: Earlier codes each; or empty, to count no flips.
        statistics: float64 ``[weights, 6]``, see :data:`.reference.FIELDS`; overwritten.
    """
    earlier = previous or codes
    for group in groups_of_equal_layout(weights, codes, earlier):
        sources, targets = [weights[i] for i in group], [codes[i] for i in group]
        compared = [earlier[i] for i in group]
        tile_rows, tile_columns = targets[0].shape
        blocks = triton.cdiv(tile_rows, BLOCK[0]) * triton.cdiv(tile_columns, BLOCK[1])
        sums = sources[0].new_empty((2, len(group), blocks), dtype=torch.float32)
        counts = sources[0].new_empty((3, len(group), blocks), dtype=torch.int32)
        with on_device_of(sources[0]):
            statistics_kernel[(blocks, len(group))](
                *members(sources), *members(targets), *members(compared), sums, counts, tile_rows, tile_columns,
                sources[0].stride(0), ALIGNED=are_aligned(sources, targets, compared), ROWS=BLOCK[0], COLUMNS=BLOCK[1],
                num_warps=WARPS,
            )  # fmt: skip
        kept, pruned = sums.sum(2, dtype=torch.float64)
        kept_count, nonfinite, flips = counts.sum(2).double()
        total = torch.full_like(kept, sources[0].numel())
        rows = torch.stack([kept, pruned, kept_count, total, nonfinite, flips], dim=1)
        statistics.index_copy_(0, table(tuple(group), statistics.device), rows)


@triton.jit
def statistics_kernel(
    weight_base, weight_offsets, code_base, code_offsets, previous_base, previous_offsets, sums, counts, tile_rows,
    tile_columns, stride, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over ROWS × COLUMNS tiles of the program's weight."""
    tensor = tl.program_id(1)
    _, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    inside = (row < tile_rows) & (column < tile_columns)
    code = load_code(tensor_pointer(code_base, code_offsets, tensor, ALIGNED) + row * tile_columns + column, inside)
    before = tensor_pointer(previous_base, previous_offsets, tensor, ALIGNED)
    earlier = load_code(before + row * tile_columns + column, inside)
    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)
    pointers = tensor_pointer(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * stride + element
    kept = tl.zeros((ROWS, COLUMNS), tl.float32)
    pruned = tl.zeros((ROWS, COLUMNS), tl.float32)
    nonfinite = tl.zeros((ROWS, COLUMNS), tl.int32)
    for line in tl.static_range(4):
        values = tl.load(pointers + line * stride, mask=within, other=0.0).to(tl.float32)
        x0, x1, x2, x3 = split_columns(tl.abs(values), ROWS, COLUMNS)  # [ROWS, 4·COLUMNS] to [ROWS, COLUMNS] each
        nibble = code >> (4 * line)
        kept, pruned, nonfinite = add_entry(x0, nibble & 1, kept, pruned, nonfinite)
        kept, pruned, nonfinite = add_entry(x1, nibble & 2, kept, pruned, nonfinite)
        kept, pruned, nonfinite = add_entry(x2, nibble & 4, kept, pruned, nonfinite)
        kept, pruned, nonfinite = add_entry(x3, nibble & 8, kept, pruned, nonfinite)
    place = tensor * tl.num_programs(0) + tl.program_id(0)
    step = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums + place, tl.sum(kept))
    tl.store(sums + step + place, tl.sum(pruned))
    tl.store(counts + place, tl.sum(count_bits(code)))
    tl.store(counts + step + place, tl.sum(nonfinite))
    tl.store(counts + 2 * step + place, tl.sum(count_bits(code ^ earlier)))


@triton.jit
def add_entry(magnitude, bit, kept, pruned, nonfinite):
    """Add an entry of every tile to the sums; infinite and NaN entries are only counted."""
    finite = magnitude < float("inf")
    counted = tl.where(finite, magnitude, 0.0)
    kept += tl.where(bit != 0, counted, 0.0)
    pruned += tl.where(bit != 0, 0.0, counted)
    return kept, pruned, nonfinite + tl.where(finite, 0, 1)
