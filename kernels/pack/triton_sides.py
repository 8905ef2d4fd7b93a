"""Sides in kernels: which matrices share a launch, what it is told of its targets, and how tiles are stored there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import kept_pair, meta_nibble, metadata_place, pair_bits, tensor_pointer, transposed_nibbles
from ..plan import Group, Plan, groups_of_equal_layout
from ..pointer_tables import members
from .sides import Side

PAIRS = {torch.float32: torch.int64, torch.float16: torch.int32, torch.bfloat16: torch.int32}
"""Two kept values as one integer, which a kernel stores."""

TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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


def plan_of_sides(
    sources: Sequence[Tensor], tiles: Sequence[Tensor], side: Side | None, side_t: Side | None,
    blocks: Mapping[torch.dtype, tuple[int, int, int]], pairs: bool = False,
) -> Plan[Settings]:  # fmt: skip
    """Return launches over sources, what each of their tiles has, and targets, in the order of ``Side.columns``.

    Args:
        sources: A matrix each, contiguous columns.
        tiles: ``[O/4, I/4]`` each.
        side: Targets of W; or None.
        side_t: The same of Wᵀ.
        blocks: Of programs, by the sources' dtype: rows and columns in tiles, warps.
        pairs: Sources are read two entries at a time.
    """
    sides = [given for given in (side, side_t) if given is not None]
    groups = []
    for positions in groups_of_equal_sides([sources, tiles], side, side_t):
        source, tile = sources[positions[0]], tiles[positions[0]]
        block = blocks[source.dtype]
        tile_rows, tile_columns = tile.shape
        count = -(-tile_rows // block[0]) * -(-tile_columns // block[1])
        settings = Settings(
            (count, len(positions)), (tile_rows, tile_columns), (-(-tile_rows // 4), -(-tile_columns // 4)),
            source.stride(0), block, sides[0].values[positions[0]].dtype if sides else source.dtype,
            (int(side.orders[positions[0]]) if side else 0, int(side_t.orders[positions[0]]) if side_t else 0),
        )  # fmt: skip
        sizes = [source.element_size() * (1 + pairs), tile.element_size()]
        for given in sides:
            values, meta, places = (column[positions[0]] for column in given.columns)
            sizes += [2 * values.element_size(), meta.element_size(), places.element_size()]  # values go in pairs
        groups.append(Group(positions, sizes, settings))
    return Plan(groups)


def target_arguments(
    sides: Sequence[Side | None], firsts: Sequence[Tensor], offsets: Sequence[Tensor], unread: Sequence[Tensor]
) -> list[Tensor]:
    """Return what a launch is told of its targets: the first of each column, and where the others are."""
    written: list[Tensor] = []
    rest = iter(zip(firsts, offsets, strict=True))
    for given in sides:
        if given is None:
            written += [*unread] * 3
            continue
        for number, (target, table_of) in zip(range(3), rest, strict=False):
            written += [target if number else target.view(PAIRS[target.dtype]), table_of]
    return written


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
        store_turned_side(
            transposed_nibbles(a, b, c, d), columns_of_tiles(rows_of_tiles), side_t, tensor, top, left, tile_rows,
            tile_columns, word_rows, ORDER_T, DTYPE, ALIGNED, EMULATE_ROUNDING, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def columns_of_tiles(rows_of_tiles):
    """The entries of tiles by columns."""
    a0, a1, a2, a3 = rows_of_tiles[0]
    b0, b1, b2, b3 = rows_of_tiles[1]
    c0, c1, c2, c3 = rows_of_tiles[2]
    d0, d1, d2, d3 = rows_of_tiles[3]
    return (a0, b0, c0, d0), (a1, b1, c1, d1), (a2, b2, c2, d2), (a3, b3, c3, d3)


@triton.jit
def line_pair(nibbles, entries, line: tl.constexpr, DTYPE: tl.constexpr, EMULATE_ROUNDING: tl.constexpr):
    """What is kept of a line of tiles, two to an integer; it is given so if DTYPE is None, else as four entries."""
    if DTYPE is None:
        return entries
    else:
        x0, x1, x2, x3 = entries
        first, last = kept_pair(nibbles[line], x0, x1, x2, x3)
        return pair_bits(first, last, DTYPE, EMULATE_ROUNDING)


@triton.jit
def meta_pairs(nibbles, DTYPE: tl.constexpr):
    """Metadata of four lines, two to an integer: half as many exchanges between threads; just so if DTYPE is None."""
    if DTYPE is None:
        return nibbles
    else:
        a, b, c, d = nibbles
        return meta_nibble(a) | (meta_nibble(b) << 16), meta_nibble(c) | (meta_nibble(d) << 16)


@triton.jit
def store_side(
    nibbles, entries, side, tensor, top, left, tile_rows, tile_columns, word_columns, ORDER: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pack ROWS × COLUMNS tiles of W: the kept pair of the four entries of every row of a tile, and where it was.

    If DTYPE is None, these are given: pairs for entries, and what ``meta_pairs`` returns for nibbles.
    """
    values_base, values_offsets, meta_base, meta_offsets, table_base, table_offsets = side
    row, column = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    inside = (row < tile_rows) & (column < tile_columns)
    values = tensor_pointer(values_base, values_offsets, tensor, ALIGNED) + row * 4 * tile_columns + column
    for line in tl.static_range(4):
        pair = line_pair(nibbles, entries[line], line, DTYPE, EMULATE_ROUNDING)  # [ROWS, COLUMNS]
        tl.store(values + line * tile_columns, pair, mask=inside)
    first, last = meta_pairs(nibbles, DTYPE)
    upper = four_nibbles(tl.where(inside, first, 0), ROWS, COLUMNS)
    lower = four_nibbles(tl.where(inside, last, 0), ROWS, COLUMNS)
    word = left // 4 + tl.arange(0, COLUMNS // 4)[None, :]  # words are [ROWS, COLUMNS/4]
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
        pair = line_pair(nibbles, entries[line], line, DTYPE, EMULATE_ROUNDING)  # [ROWS, COLUMNS]
        tl.store(values + line * tile_rows, tl.trans(pair), mask=inside_t)  # [COLUMNS, ROWS]
    first, last = meta_pairs(nibbles, DTYPE)
    upper = four_nibbles(tl.trans(tl.where(inside, first, 0)), COLUMNS, ROWS)
    lower = four_nibbles(tl.trans(tl.where(inside, last, 0)), COLUMNS, ROWS)
    word = top // 4 + tl.arange(0, ROWS // 4)[None, :]  # words are [COLUMNS, ROWS/4]
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
def four_nibbles(nibbles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[ROWS, COLUMNS]`` nibbles to ``[ROWS, COLUMNS/4]`` words, in both halves of an integer at once."""
    fours = tl.reshape(nibbles, (ROWS, COLUMNS // 4, 4))
    return tl.sum(fours << (4 * tl.arange(0, 4))[None, None, :], axis=2)
