"""Packing a weight and its transpose in one pass, with or without search and statistics, as a Triton kernel."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import (
    count_bits,
    kept_pair,
    load_code,
    nibbles_of,
    pruned_pair,
    split_columns,
    tensor_pointer,
    tiles_of_program,
)
from ..launch import Known, Launch, interpreted, launch
from ..mask_search.triton_kernel import best_nibbles, ranking_key
from ..plan import Plan
from ..pointer_tables import table
from .sides import Side
from .triton_sides import TRITON, Settings, plan_of_sides, store_sides, target_arguments

# one program: rows and columns in tiles, warps. Both sides write runs of at least 64 bytes.
BOTH = {torch.float32: (32, 32, 8), torch.float16: (16, 32, 4), torch.bfloat16: (16, 32, 4)}
ALONE = dict.fromkeys(BOTH, (4, 64, 4))  # without the transpose
SUMS = 4  # of every block: kept, pruned, entries that are not finite, flips


def pack_into(
    weights: Sequence[Tensor], codes: Sequence[Tensor], side: Side | None, side_t: Side | None, search: bool,
    statistics: Tensor | None = None, plan: Plan[Settings] | None = None, known: Known | None = None,
) -> None:  # fmt: skip
    """Pack several weights; weights of equal layout share one launch.

    Args:
        weights: float32, float16 or bfloat16 ``[O, I]`` each, columns contiguous, rows at any stride.
        codes: int16 ``[O/4, I/4]`` each, contiguous; read, or overwritten if ``search``.
        side: Targets of W, overwritten; or None.
        side_t: The same of Wᵀ; values of both sides have one dtype.
        search: Search the masks of largest ``Σ|w|`` first.
        statistics: With ``search``: float64 ``[weights, 6]``, the ``FIELDS``; flips are from the codes that were there.
        plan: Of these layouts and orders; None to make one.
        known: Of these columns; None to look where they are.
    """
    plan = plan or plan_of(weights, codes, side, side_t)
    order = [i for group in plan.groups for i in group.positions]
    # rows in the order of the launches, so that each writes to one piece
    sums = None
    if statistics is not None:
        blocks = max(group.settings.grid[0] for group in plan.groups)
        sums = weights[0].new_zeros((len(order), SUMS, blocks), dtype=torch.float32)
    columns = [weights, codes, *(column for each in (side, side_t) if each is not None for column in each.columns)]

    def launches() -> Iterator[Launch]:
        start = 0
        for group, offsets, aligned in plan.placed(columns, known):
            end = start + len(group.positions)
            firsts, piece = [column[group.first] for column in columns], None if sums is None else sums[start:end]
            widest = all(aligned[:4] + aligned[5:7])  # tables are read a number at a time
            yield _launch(group.settings, firsts, offsets, widest, (side, side_t), search, piece)
            start = end

    launch(launches(), known, weights[0])
    if statistics is not None and sums is not None:
        kept, pruned, nonfinite, flips = sums.sum(2, dtype=torch.float64).unbind(1)
        total = table(tuple(weights[i].numel() for i in order), statistics.device)
        rows = torch.stack([kept, pruned, total / 2, total.double(), nonfinite, flips], dim=1)
        statistics.index_copy_(0, table(tuple(order), statistics.device), rows)


def plan_of(
    weights: Sequence[Tensor], codes: Sequence[Tensor], side: Side | None, side_t: Side | None
) -> Plan[Settings]:
    """Return the launches of weights, their codes and their targets, in that order and that of ``Side.columns``."""
    return plan_of_sides(weights, codes, side, side_t, ALONE if side_t is None else BOTH)


def _launch(
    settings: Settings, firsts: Sequence[Tensor], offsets: Sequence[Tensor], aligned: bool,
    sides: tuple[Side | None, Side | None], search: bool, sums: Tensor | None,
) -> Launch:  # fmt: skip
    weight, code, *targets = firsts
    rows, columns, warps = settings.block
    written = target_arguments(sides, targets, offsets[2:], (code, offsets[1]))
    arguments = (
        weight, offsets[0], code, offsets[1], *written, code if sums is None else sums, *settings.tiles,
        *settings.words, 0 if sums is None else sums.shape[2], settings.stride,
    )  # fmt: skip
    options = {
        "DTYPE": TRITON[settings.dtype], "SEARCH": search, "STATISTICS": sums is not None,
        "FORWARD": sides[0] is not None, "TRANSPOSED": sides[1] is not None, "ORDER": settings.orders[0],
        "ORDER_T": settings.orders[1], "ALIGNED": aligned, "EMULATE_ROUNDING": interpreted(), "ROWS": rows,
        "COLUMNS": columns, "num_warps": warps,
    }  # fmt: skip
    return Launch(pack_kernel, settings.grid, arguments, options)


@triton.jit
def pack_kernel(
    weight_base, weight_offsets, code_base, code_offsets, values_base, values_offsets, meta_base, meta_offsets,
    table_base, table_offsets, values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, table_t_base,
    table_t_offsets, sums, tile_rows, tile_columns, word_rows, word_columns, blocks_of_sums, stride,
    DTYPE: tl.constexpr, SEARCH: tl.constexpr, STATISTICS: tl.constexpr, FORWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, ORDER_T: tl.constexpr, ALIGNED: tl.constexpr,
    EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Handle ROWS × COLUMNS tiles of the program's weight; codes are written if SEARCH, else read.

    W is packed if FORWARD, Wᵀ if TRANSPOSED, metadata in ORDER and ORDER_T; STATISTICS writes the block's sums.
    """
    tensor = tl.program_id(1)
    top, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    inside = (row < tile_rows) & (column < tile_columns)  # [ROWS, COLUMNS] tiles

    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)  # [ROWS, 4·COLUMNS] entries of one row of every tile
    pointers = tensor_pointer(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * stride + element
    row_a = tl.load(pointers, mask=within, other=0.0).to(tl.float32)
    row_b = tl.load(pointers + stride, mask=within, other=0.0).to(tl.float32)
    row_c = tl.load(pointers + 2 * stride, mask=within, other=0.0).to(tl.float32)
    row_d = tl.load(pointers + 3 * stride, mask=within, other=0.0).to(tl.float32)
    a0, a1, a2, a3 = split_columns(row_a, ROWS, COLUMNS)  # [ROWS, COLUMNS] each
    b0, b1, b2, b3 = split_columns(row_b, ROWS, COLUMNS)
    c0, c1, c2, c3 = split_columns(row_c, ROWS, COLUMNS)
    d0, d1, d2, d3 = split_columns(row_d, ROWS, COLUMNS)

    codes = tensor_pointer(code_base, code_offsets, tensor, ALIGNED) + row * tile_columns + column
    if SEARCH:
        a, b, c, d = best_nibbles(
            ranking_key(a0, True), ranking_key(a1, True), ranking_key(a2, True), ranking_key(a3, True),
            ranking_key(b0, True), ranking_key(b1, True), ranking_key(b2, True), ranking_key(b3, True),
            ranking_key(c0, True), ranking_key(c1, True), ranking_key(c2, True), ranking_key(c3, True),
            ranking_key(d0, True), ranking_key(d1, True), ranking_key(d2, True), ranking_key(d3, True),
        )  # fmt: skip
        code = a | (b << 4) | (c << 8) | (d << 12)
        if STATISTICS:
            flips = tl.where(inside, count_bits(code ^ load_code(codes, inside)), 0)
        tl.store(codes, code.to(tl.int16), mask=inside)
    else:
        a, b, c, d = nibbles_of(load_code(codes, inside))

    if STATISTICS:
        kept = tl.zeros((ROWS, COLUMNS), tl.float32)
        pruned = tl.zeros((ROWS, COLUMNS), tl.float32)
        others = tl.zeros((ROWS, COLUMNS), tl.int32)
        kept, pruned, others = add_row(a, a0, a1, a2, a3, kept, pruned, others)
        kept, pruned, others = add_row(b, b0, b1, b2, b3, kept, pruned, others)
        kept, pruned, others = add_row(c, c0, c1, c2, c3, kept, pruned, others)
        kept, pruned, others = add_row(d, d0, d1, d2, d3, kept, pruned, others)
        place = sums + tensor.to(tl.int64) * 4 * blocks_of_sums + tl.program_id(0)
        tl.store(place, tl.sum(kept))
        tl.store(place + blocks_of_sums, tl.sum(pruned))
        counts = tl.sum(flips | (others << 16))  # of at most 16384 entries each
        tl.store(place + 2 * blocks_of_sums, (counts >> 16).to(tl.float32))
        tl.store(place + 3 * blocks_of_sums, (counts & 0xFFFF).to(tl.float32))

    store_sides(
        (a, b, c, d), ((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3)),
        (values_base, values_offsets, meta_base, meta_offsets, table_base, table_offsets),
        (values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, table_t_base, table_t_offsets),
        tensor, top, left, tile_rows, tile_columns, word_rows, word_columns, FORWARD, TRANSPOSED, ORDER, ORDER_T, DTYPE,
        ALIGNED, EMULATE_ROUNDING, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def add_row(nibble, x0, x1, x2, x3, kept, pruned, others):
    """Add a row of every tile, of which two entries are kept: magnitudes of finite entries, and a count of others."""
    first, last = kept_pair(nibble, x0, x1, x2, x3)
    kept, others = add_finite(first, kept, others)
    kept, others = add_finite(last, kept, others)
    first, last = pruned_pair(nibble, x0, x1, x2, x3)
    pruned, others = add_finite(first, pruned, others)
    pruned, others = add_finite(last, pruned, others)
    return kept, pruned, others


@triton.jit
def add_finite(value, total, others):
    """Add a magnitude to the sum, or 1 to the count of what is not finite."""
    finite = tl.abs(value) < float("inf")
    return total + tl.where(finite, tl.abs(value), 0.0), others + tl.where(finite, 0, 1)
