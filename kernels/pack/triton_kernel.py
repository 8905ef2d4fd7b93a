"""Packing a weight and its transpose in one pass, with or without search and statistics, as a Triton kernel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import (
    count_bits,
    join_columns,
    kept_pair,
    load_code,
    metadata_place,
    nibbles_of,
    pair_bits,
    places,
    pruned_pair,
    split_columns,
    tensor_pointer,
    transposed_nibbles,
)
from ..launch import Known, Launch, interpreted, launch, on_device_of
from ..mask_search.triton_kernel import best_nibbles, ranking_key
from ..plan import Group, Plan, groups_of_equal_layout
from ..pointer_tables import members, table
from .sides import Side

# one program: rows and columns in tiles, warps. Both sides write runs of at least 64 bytes.
BOTH = {torch.float32: (32, 32, 8), torch.float16: (16, 32, 4), torch.bfloat16: (16, 32, 4)}
ALONE = (4, 64, 4)  # without the transpose
SUMS = 4  # of every block: kept, pruned, entries that are not finite, flips
PAIRS = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What a launch is told of its tensors' layout."""

    grid: tuple[int, int]
    tiles: tuple[int, int]
    words: tuple[int, int]
    stride: int
    block: tuple[int, int, int]
    dtype: torch.dtype
    orders: tuple[int, int]


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
        statistics: With ``search``: float64 ``[weights, 6]``, overwritten, see ``FIELDS`` of the statistics; flips are
            counted from the codes that were there.
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
    sides = [given for given in (side, side_t) if given is not None]
    groups = []
    for positions in groups_of_equal_sides([weights, codes], side, side_t):
        weight, code = weights[positions[0]], codes[positions[0]]
        block = BOTH[weight.dtype] if side_t is not None else ALONE
        tile_rows, tile_columns = code.shape
        blocks = -(-tile_rows // block[0]) * -(-tile_columns // block[1])
        settings = Settings(
            (blocks, len(positions)), (tile_rows, tile_columns), (-(-tile_rows // 4), -(-tile_columns // 4)),
            weight.stride(0), block, sides[0].values[positions[0]].dtype if sides else weight.dtype,
            (int(side.orders[positions[0]]) if side else 0, int(side_t.orders[positions[0]]) if side_t else 0),
        )  # fmt: skip
        sizes = [weight.element_size(), code.element_size()]
        for given in sides:
            values, meta, places = (column[positions[0]] for column in given.columns)
            sizes += [2 * values.element_size(), meta.element_size(), places.element_size()]  # values go in pairs
        groups.append(Group(positions, sizes, settings))
    return Plan(groups)


def groups_of_equal_sides(
    columns: Sequence[Sequence[Tensor]], side: Side | None, side_t: Side | None
) -> list[list[int]]:
    """Return positions that can share a launch: of equal layouts, in columns of tensors and in targets and orders."""
    sides = [given for given in (side, side_t) if given is not None]
    groups: dict[tuple[int, ...], list[int]] = {}
    for alike in groups_of_equal_layout(*columns, *(column for each in sides for column in each.columns)):
        for position in alike:
            orders = (each.orders[position] for each in sides)
            groups.setdefault((alike[0], *orders), []).append(position)
    return list(groups.values())


def side_arguments(
    side: Side | None, side_t: Side | None, unread: Sequence[Tensor]
) -> tuple[list[Sequence[Tensor]], list[Tensor]]:
    """Return the tensors that a launch writes for its sides, and their arguments; those of a missing side are unread.

    A kernel stores a pair of kept values as one integer.
    """
    outputs: list[Sequence[Tensor]] = []
    arguments: list[Tensor] = []
    for given in (side, side_t):
        if given is None:
            arguments += [*members(unread)] * 3
            continue
        pairs = [values.view(PAIRS[values.dtype]) for values in given.values]
        outputs += [pairs, given.meta]
        arguments += [*members(pairs), *members(given.meta), *members(given.tables)]
    return outputs, arguments


def _launch(
    settings: Settings, firsts: Sequence[Tensor], offsets: Sequence[Tensor], aligned: bool,
    sides: tuple[Side | None, Side | None], search: bool, sums: Tensor | None,
) -> Launch:  # fmt: skip
    weight, code, *targets = firsts
    rows, columns, warps = settings.block
    written: list[Tensor] = []
    rest = iter(zip(targets, offsets[2:], strict=True))
    for given in sides:
        if given is None:
            written += [code, offsets[1]] * 3  # unread
            continue
        for number, (target, table_of) in zip(range(3), rest, strict=False):
            written += [target if number else target.view(PAIRS[target.dtype]), table_of]
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
    blocks = tl.cdiv(tile_columns, COLUMNS)
    top = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    left = (tl.program_id(0) % blocks) * COLUMNS
    row, column = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    inside = (row < tile_rows) & (column < tile_columns)

    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)
    pointers = tensor_pointer(weight_base, weight_offsets, tensor, ALIGNED) + row * 4 * stride + element
    row_a = tl.load(pointers, mask=within, other=0.0).to(tl.float32)
    row_b = tl.load(pointers + stride, mask=within, other=0.0).to(tl.float32)
    row_c = tl.load(pointers + 2 * stride, mask=within, other=0.0).to(tl.float32)
    row_d = tl.load(pointers + 3 * stride, mask=within, other=0.0).to(tl.float32)
    a0, a1, a2, a3 = split_columns(row_a, ROWS, COLUMNS)
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
def store_sides(
    nibbles, rows_of_tiles, side, side_t, tensor, top, left, tile_rows, tile_columns, word_rows, word_columns,
    FORWARD: tl.constexpr, TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, ORDER_T: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr, EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pack ROWS × COLUMNS tiles for the sides that are wanted, from their four rows of nibbles and of entries."""
    if FORWARD:
        store_side(
            nibbles, rows_of_tiles, side, tensor, top, left, tile_rows, tile_columns, word_columns, ORDER, DTYPE,
            ALIGNED, EMULATE_ROUNDING, ROWS, COLUMNS,
        )  # fmt: skip
    if TRANSPOSED:
        a, b, c, d = nibbles
        a0, a1, a2, a3 = rows_of_tiles[0]
        b0, b1, b2, b3 = rows_of_tiles[1]
        c0, c1, c2, c3 = rows_of_tiles[2]
        d0, d1, d2, d3 = rows_of_tiles[3]
        columns_of_tiles = ((a0, b0, c0, d0), (a1, b1, c1, d1), (a2, b2, c2, d2), (a3, b3, c3, d3))
        store_turned_side(
            transposed_nibbles(a, b, c, d), columns_of_tiles, side_t, tensor, top, left, tile_rows, tile_columns,
            word_rows, ORDER_T, DTYPE, ALIGNED, EMULATE_ROUNDING, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def store_side(
    nibbles, entries, side, tensor, top, left, tile_rows, tile_columns, word_columns, ORDER: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pack ROWS × COLUMNS tiles of W: the kept pair of the four entries of every row of a tile, and where it was."""
    values_base, values_offsets, meta_base, meta_offsets, table_base, table_offsets = side
    row, column = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    inside = (row < tile_rows) & (column < tile_columns)
    values = tensor_pointer(values_base, values_offsets, tensor, ALIGNED) + row * 4 * tile_columns + column
    for line in tl.static_range(4):
        x0, x1, x2, x3 = entries[line]
        first, last = kept_pair(nibbles[line], x0, x1, x2, x3)
        tl.store(values + line * tile_columns, pair_bits(first, last, DTYPE, EMULATE_ROUNDING), mask=inside)
    # the words of two rows in one integer: half as many exchanges between threads
    a, b, c, d = nibbles
    upper = four_nibbles(tl.where(inside, places(a) | (places(b) << 16), 0), ROWS, COLUMNS)
    lower = four_nibbles(tl.where(inside, places(c) | (places(d) << 16), 0), ROWS, COLUMNS)
    word = left // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    written = (row < tile_rows) & (word < word_columns)
    meta = tensor_pointer(meta_base, meta_offsets, tensor, ALIGNED)
    table = table_base + tl.load(table_offsets + tensor)
    store_words(meta, upper, lower, row * 4, word, written, word_columns, tile_rows * 4, ORDER, table)


@triton.jit
def store_turned_side(
    nibbles, entries, side, tensor, top, left, tile_rows, tile_columns, word_rows, ORDER: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same of Wᵀ, from the four entries of every column of a tile."""
    values_base, values_offsets, meta_base, meta_offsets, table_base, table_offsets = side
    row, column = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    inside = (row < tile_rows) & (column < tile_columns)
    row_t, column_t = top + tl.arange(0, ROWS)[None, :], left.to(tl.int64) + tl.arange(0, COLUMNS)[:, None]
    inside_t = (row_t < tile_rows) & (column_t < tile_columns)
    values = tensor_pointer(values_base, values_offsets, tensor, ALIGNED) + column_t * 4 * tile_rows + row_t
    for line in tl.static_range(4):
        x0, x1, x2, x3 = entries[line]
        first, last = kept_pair(nibbles[line], x0, x1, x2, x3)
        tl.store(values + line * tile_rows, tl.trans(pair_bits(first, last, DTYPE, EMULATE_ROUNDING)), mask=inside_t)
    w, x, y, z = nibbles
    upper = four_nibbles(tl.trans(tl.where(inside, places(w) | (places(x) << 16), 0)), COLUMNS, ROWS)
    lower = four_nibbles(tl.trans(tl.where(inside, places(y) | (places(z) << 16), 0)), COLUMNS, ROWS)
    word = top // 4 + tl.arange(0, ROWS // 4)[None, :]
    written = (column_t < tile_columns) & (word < word_rows)
    meta = tensor_pointer(meta_base, meta_offsets, tensor, ALIGNED)
    table = table_base + tl.load(table_offsets + tensor)
    store_words(meta, upper, lower, column_t * 4, word, written, word_rows, tile_columns * 4, ORDER, table)


@triton.jit
def store_words(meta, upper, lower, row, word, inside, word_columns, rows, ORDER: tl.constexpr, table):
    """Write the words of four rows from ``row`` on, two to an integer, to their places in the ORDER."""
    place = metadata_place(row, word, inside, word_columns, rows, ORDER, table)
    tl.store(meta + place, upper.to(tl.int16), mask=inside)
    place = metadata_place(row + 1, word, inside, word_columns, rows, ORDER, table)
    tl.store(meta + place, (upper >> 16).to(tl.int16), mask=inside)
    place = metadata_place(row + 2, word, inside, word_columns, rows, ORDER, table)
    tl.store(meta + place, lower.to(tl.int16), mask=inside)
    place = metadata_place(row + 3, word, inside, word_columns, rows, ORDER, table)
    tl.store(meta + place, (lower >> 16).to(tl.int16), mask=inside)


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
