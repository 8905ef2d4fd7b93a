"""Packing a weight and its transpose in one pass, with or without the mask search, as a Triton kernel."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import (
    join_columns,
    kept_pair,
    load_code,
    member,
    nibbles_of,
    pair_bits,
    places,
    split_columns,
    transposed_nibbles,
)
from ..launch import are_aligned, groups_of_equal_layout, interpreted, members, on_device_of
from ..mask_search.triton_kernel import best_nibbles, ranking_key

# one program: rows and columns in tiles, warps. Both sides write runs of at least 64 bytes.
BOTH = {torch.float32: (32, 32, 8), torch.float16: (16, 32, 4), torch.bfloat16: (16, 32, 4)}
ALONE = (4, 64, 4)  # without the transpose
PAIRS = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def pack_into(
    weights: Sequence[Tensor], codes: Sequence[Tensor], packed: Sequence[Sequence[Tensor]], search: bool
) -> None:
    """Pack several weights; weights of equal layout share one launch.

    Args:
        weights: float32, float16 or bfloat16 ``[O, I]`` each, columns contiguous, rows at any stride.
        codes: int16 ``[O/4, I/4]`` each, contiguous; read, or overwritten if ``search``.
        packed: Lists of ``values``, ``meta`` and, for the transpose, ``values_t``, ``meta_t``: one entry for each
            weight, shaped as by :func:`.reference.empty_packed`, contiguous; overwritten.
        search: Search the masks of largest ``Σ|w|`` first.
    """
    for group in groups_of_equal_layout(weights, codes, *packed):
        sources, targets = [weights[i] for i in group], [codes[i] for i in group]
        dtype, (tile_rows, tile_columns) = packed[0][group[0]].dtype, targets[0].shape
        # a pair of kept values is one integer
        outputs = [
            [column[i].view(PAIRS[dtype]) if place % 2 == 0 else column[i] for i in group]
            for place, column in enumerate(packed)
        ]
        transposed = len(outputs) == 4
        rows, columns, warps = BOTH[sources[0].dtype] if transposed else ALONE
        arguments = [entry for column in (outputs if transposed else outputs * 2) for entry in members(column)]
        grid = (triton.cdiv(tile_rows, rows) * triton.cdiv(tile_columns, columns), len(group))
        with on_device_of(sources[0]):
            pack_kernel[grid](
                *members(sources), *members(targets), *arguments, tile_rows, tile_columns, triton.cdiv(tile_rows, 4),
                triton.cdiv(tile_columns, 4), sources[0].stride(0), DTYPE=TRITON[dtype], SEARCH=search,
                TRANSPOSED=transposed, ALIGNED=are_aligned(sources, targets, *outputs), BY_HAND=interpreted(),
                ROWS=rows, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip


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
    grid = (triton.cdiv(rows, ALONE[0]) * triton.cdiv(groups, 4 * ALONE[1]),)
    with on_device_of(values):
        unpack_kernel[grid](
            pairs, meta, written, rows, groups, meta.shape[1], BITS=8 * values.element_size(), ROWS=ALONE[0],
            GROUPS=4 * ALONE[1], num_warps=ALONE[2],
        )  # fmt: skip


@triton.jit
def pack_kernel(
    weight_base, weight_offsets, code_base, code_offsets, values_base, values_offsets, meta_base, meta_offsets,
    values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, tile_rows, tile_columns, word_rows, word_columns,
    stride, DTYPE: tl.constexpr, SEARCH: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    BY_HAND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pack ROWS × COLUMNS tiles of the program's weight; its codes are written if SEARCH, else read."""
    tensor = tl.program_id(1)
    blocks = tl.cdiv(tile_columns, COLUMNS)
    top = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    left = (tl.program_id(0) % blocks) * COLUMNS
    row, column = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    inside = (row < tile_rows) & (column < tile_columns)

    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)
    pointers = member(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * stride + element
    row_a = tl.load(pointers, mask=within, other=0.0).to(tl.float32)
    row_b = tl.load(pointers + stride, mask=within, other=0.0).to(tl.float32)
    row_c = tl.load(pointers + 2 * stride, mask=within, other=0.0).to(tl.float32)
    row_d = tl.load(pointers + 3 * stride, mask=within, other=0.0).to(tl.float32)
    a0, a1, a2, a3 = split_columns(row_a, ROWS, COLUMNS)
    b0, b1, b2, b3 = split_columns(row_b, ROWS, COLUMNS)
    c0, c1, c2, c3 = split_columns(row_c, ROWS, COLUMNS)
    d0, d1, d2, d3 = split_columns(row_d, ROWS, COLUMNS)

    codes = member(code_base, code_offsets, tensor, ALIGNED) + row * tile_columns + column
    if SEARCH:
        a, b, c, d = best_nibbles(
            ranking_key(a0, True), ranking_key(a1, True), ranking_key(a2, True), ranking_key(a3, True),
            ranking_key(b0, True), ranking_key(b1, True), ranking_key(b2, True), ranking_key(b3, True),
            ranking_key(c0, True), ranking_key(c1, True), ranking_key(c2, True), ranking_key(c3, True),
            ranking_key(d0, True), ranking_key(d1, True), ranking_key(d2, True), ranking_key(d3, True),
        )  # fmt: skip
        tl.store(codes, (a | (b << 4) | (c << 8) | (d << 12)).to(tl.int16), mask=inside)
    else:
        a, b, c, d = nibbles_of(load_code(codes, inside))

    values = member(values_base, values_offsets, tensor, ALIGNED) + row * 4 * tile_columns + column
    first, last = kept_pair(a, a0, a1, a2, a3)
    tl.store(values, pair_bits(first, last, DTYPE, BY_HAND), mask=inside)
    first, last = kept_pair(b, b0, b1, b2, b3)
    tl.store(values + tile_columns, pair_bits(first, last, DTYPE, BY_HAND), mask=inside)
    first, last = kept_pair(c, c0, c1, c2, c3)
    tl.store(values + 2 * tile_columns, pair_bits(first, last, DTYPE, BY_HAND), mask=inside)
    first, last = kept_pair(d, d0, d1, d2, d3)
    tl.store(values + 3 * tile_columns, pair_bits(first, last, DTYPE, BY_HAND), mask=inside)

    # the words of two rows in one integer: half as many exchanges between threads
    upper = four_nibbles(tl.where(inside, places(a) | (places(b) << 16), 0), ROWS, COLUMNS)
    lower = four_nibbles(tl.where(inside, places(c) | (places(d) << 16), 0), ROWS, COLUMNS)
    word = left // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    written = (row < tile_rows) & (word < word_columns)
    words = member(meta_base, meta_offsets, tensor, ALIGNED) + row * 4 * word_columns + word
    tl.store(words, upper.to(tl.int16), mask=written)
    tl.store(words + word_columns, (upper >> 16).to(tl.int16), mask=written)
    tl.store(words + 2 * word_columns, lower.to(tl.int16), mask=written)
    tl.store(words + 3 * word_columns, (lower >> 16).to(tl.int16), mask=written)

    if TRANSPOSED:
        w, x, y, z = transposed_nibbles(a, b, c, d)
        row_t, column_t = top + tl.arange(0, ROWS)[None, :], left.to(tl.int64) + tl.arange(0, COLUMNS)[:, None]
        inside_t = (row_t < tile_rows) & (column_t < tile_columns)
        values_t = member(values_t_base, values_t_offsets, tensor, ALIGNED) + column_t * 4 * tile_rows + row_t
        first, last = kept_pair(w, a0, b0, c0, d0)
        tl.store(values_t, tl.trans(pair_bits(first, last, DTYPE, BY_HAND)), mask=inside_t)
        first, last = kept_pair(x, a1, b1, c1, d1)
        tl.store(values_t + tile_rows, tl.trans(pair_bits(first, last, DTYPE, BY_HAND)), mask=inside_t)
        first, last = kept_pair(y, a2, b2, c2, d2)
        tl.store(values_t + 2 * tile_rows, tl.trans(pair_bits(first, last, DTYPE, BY_HAND)), mask=inside_t)
        first, last = kept_pair(z, a3, b3, c3, d3)
        tl.store(values_t + 3 * tile_rows, tl.trans(pair_bits(first, last, DTYPE, BY_HAND)), mask=inside_t)

        upper = four_nibbles(tl.trans(tl.where(inside, places(w) | (places(x) << 16), 0)), COLUMNS, ROWS)
        lower = four_nibbles(tl.trans(tl.where(inside, places(y) | (places(z) << 16), 0)), COLUMNS, ROWS)
        word_t = top // 4 + tl.arange(0, ROWS // 4)[None, :]
        written = (column_t < tile_columns) & (word_t < word_rows)
        words_t = member(meta_t_base, meta_t_offsets, tensor, ALIGNED) + column_t * 4 * word_rows + word_t
        tl.store(words_t, upper.to(tl.int16), mask=written)
        tl.store(words_t + word_rows, (upper >> 16).to(tl.int16), mask=written)
        tl.store(words_t + 2 * word_rows, lower.to(tl.int16), mask=written)
        tl.store(words_t + 3 * word_rows, (lower >> 16).to(tl.int16), mask=written)


@triton.jit
def four_nibbles(places, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[ROWS, COLUMNS]`` nibbles to ``[ROWS, COLUMNS/4]`` words, in both halves of an integer at once."""
    fours = tl.reshape(places, (ROWS, COLUMNS // 4, 4))
    return tl.sum(fours << (4 * tl.arange(0, 4))[None, None, :], axis=2)


@triton.jit
def unpack_kernel(
    pairs, meta, dense, rows, groups, words, BITS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Write ROWS × GROUPS fours of columns."""
    blocks = tl.cdiv(groups, GROUPS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    left = (tl.program_id(0) % blocks) * GROUPS
    group = left + tl.arange(0, GROUPS)[None, :]
    inside = (row < rows) & (group < groups)
    pair = tl.load(pairs + row * groups + group, mask=inside, other=0)
    word = tl.load(meta + row * words + group // 4, mask=inside, other=0).to(tl.int32)
    place = (word >> (4 * (group % 4))) & 15
    first, last = pair.to(dense.dtype.element_ty), (pair >> BITS).to(dense.dtype.element_ty)
    result = join_columns(
        entry_at(0, place, first, last), entry_at(1, place, first, last), entry_at(2, place, first, last),
        entry_at(3, place, first, last), ROWS, GROUPS,
    )  # fmt: skip
    column = left * 4 + tl.arange(0, 4 * GROUPS)[None, :]
    tl.store(dense + row * 4 * groups + column, result, mask=(row < rows) & (column < 4 * groups))


@triton.jit
def entry_at(position: tl.constexpr, place, first, last):
    """The kept entry at a position, or 0."""
    return tl.where((place & 3) == position, first, tl.where((place >> 2) == position, last, 0).to(first.dtype))
