"""Unpacking wires, transposing and packing them again in one pass, never through a dense weight, as a Triton kernel."""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import nibbles_of, tensor_pointer, tiles_of_program
from ..launch import Launch, launch
from ..pack import Side
from ..pack.triton_sides import (
    PAIRS,
    TRITON,
    Settings,
    columns_of_tiles,
    line_pair,
    plan_of_sides,
    store_side,
    store_turned_side,
    target_arguments,
)
from ..plan import Plan
from .numbering import pattern_table

# one program: rows and columns in tiles, warps. Both sides write runs of at least 64 bytes.
BOTH = dict.fromkeys(PAIRS, (16, 32, 4))
ALONE = dict.fromkeys(PAIRS, (4, 128, 4))  # without the transpose


def pack_wires_into(
    kept: Sequence[Tensor], numbers: Sequence[Tensor], side: Side | None, side_t: Side | None,
    plan: Plan[Settings] | None = None,
) -> None:  # fmt: skip
    """Pack several wires; wires of equal layout share one launch.

    Args:
        kept: Their values: float32, float16 or bfloat16 ``[O, I/2]`` each, contiguous.
        numbers: uint8 ``[O/4, I/4]`` each, contiguous.
        side: Targets of W in the values' dtype, overwritten; or None.
        side_t: The same of Wᵀ.
        plan: Of these layouts and orders; None to make one.
    """
    plan = plan or plan_of(kept, numbers, side, side_t)
    columns = [kept, numbers, *(column for each in (side, side_t) if each is not None for column in each.columns)]

    def launches() -> Iterator[Launch]:
        for group, offsets, aligned in plan.placed(columns):
            firsts = [column[group.first] for column in columns]
            # tables are read a number at a time
            yield _launch(group.settings, firsts, offsets, all(aligned[:4] + aligned[5:7]), (side, side_t))

    launch(launches(), None, kept[0])


def plan_of(
    kept: Sequence[Tensor], numbers: Sequence[Tensor], side: Side | None, side_t: Side | None
) -> Plan[Settings]:
    """Return the launches of wires and their targets, in that order and that of ``Side.columns``."""
    return plan_of_sides(kept, numbers, side, side_t, ALONE if side_t is None else BOTH, pairs=True)


def _launch(
    settings: Settings, firsts: Sequence[Tensor], offsets: Sequence[Tensor], aligned: bool,
    sides: tuple[Side | None, Side | None],
) -> Launch:  # fmt: skip
    kept, numbers, *targets = firsts
    rows, columns, warps = settings.block
    arguments = (
        kept.view(PAIRS[kept.dtype]), offsets[0], numbers, offsets[1], pattern_table(kept.device),
        *target_arguments(sides, targets, offsets[2:], (numbers, offsets[1])), *settings.tiles, *settings.words,
    )  # fmt: skip
    options = {
        "DTYPE": TRITON[settings.dtype], "FORWARD": sides[0] is not None, "TRANSPOSED": sides[1] is not None,
        "ORDER": settings.orders[0], "ORDER_T": settings.orders[1], "ALIGNED": aligned, "ROWS": rows,
        "COLUMNS": columns, "num_warps": warps,
    }  # fmt: skip
    return Launch(pack_wire_kernel, settings.grid, arguments, options)


@triton.jit
def pack_wire_kernel(
    kept_base, kept_offsets, number_base, number_offsets, patterns, values_base, values_offsets, meta_base,
    meta_offsets, table_base, table_offsets, values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, table_t_base,
    table_t_offsets, tile_rows, tile_columns, word_rows, word_columns, DTYPE: tl.constexpr, FORWARD: tl.constexpr,
    TRANSPOSED: tl.constexpr, ORDER: tl.constexpr, ORDER_T: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Handle ROWS × COLUMNS tiles of the program's wire: W is packed if FORWARD, Wᵀ if TRANSPOSED."""
    tensor = tl.program_id(1)
    top, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    inside = (row < tile_rows) & (column < tile_columns)  # [ROWS, COLUMNS] tiles
    numbers = tensor_pointer(number_base, number_offsets, tensor, ALIGNED) + row * tile_columns + column
    number = tl.load(numbers, mask=inside, other=0).to(tl.int32)
    kept = tensor_pointer(kept_base, kept_offsets, tensor, ALIGNED) + row * 4 * tile_columns + column
    pair_a = tl.load(kept, mask=inside, other=0)
    pair_b = tl.load(kept + tile_columns, mask=inside, other=0)
    pair_c = tl.load(kept + 2 * tile_columns, mask=inside, other=0)
    pair_d = tl.load(kept + 3 * tile_columns, mask=inside, other=0)
    pattern = tl.load(patterns + number)  # after the loads whose layouts are wanted; a byte is inside of the table
    codes, metadata = pattern.to(tl.int32), (pattern >> 32).to(tl.int32)  # of a tile and, above, of its transpose
    if FORWARD:
        store_side(
            meta_halves(metadata), (pair_a, pair_b, pair_c, pair_d),
            (values_base, values_offsets, meta_base, meta_offsets, table_base, table_offsets), tensor, top, left,
            tile_rows, tile_columns, word_columns, ORDER, None, ALIGNED, False, ROWS, COLUMNS,
        )  # fmt: skip
    if TRANSPOSED:
        a, b, c, d = nibbles_of(codes)
        turned = nibbles_of(codes >> 16)
        entries = columns_of_tiles(
            (entries_of(a, pair_a, DTYPE), entries_of(b, pair_b, DTYPE), entries_of(c, pair_c, DTYPE),
             entries_of(d, pair_d, DTYPE))
        )  # fmt: skip
        pairs = (
            line_pair(turned, entries[0], 0, DTYPE, False), line_pair(turned, entries[1], 1, DTYPE, False),
            line_pair(turned, entries[2], 2, DTYPE, False), line_pair(turned, entries[3], 3, DTYPE, False),
        )  # fmt: skip
        store_turned_side(
            meta_halves(metadata >> 16), pairs,
            (values_t_base, values_t_offsets, meta_t_base, meta_t_offsets, table_t_base, table_t_offsets), tensor, top,
            left, tile_rows, tile_columns, word_rows, ORDER_T, None, ALIGNED, False, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def meta_halves(metadata):
    """Four nibbles of metadata, two to an integer, as ``meta_pairs`` has them."""
    return (metadata & 15) | ((metadata & 0xF0) << 12), ((metadata >> 8) & 15) | ((metadata & 0xF000) << 4)


@triton.jit
def entries_of(nibble, pair, DTYPE: tl.constexpr):
    """The four entries of a row as int32 bits, in 16 bits the low ones; where nothing was kept, they are anything."""
    first = pair.to(tl.int32)
    last = (pair >> (32 if DTYPE == tl.float32 else 16)).to(tl.int32)
    # at 1 is the last one only if 0 was kept, at 2 the first one only if 3 was
    return first, tl.where((nibble & 1) != 0, last, first), tl.where((nibble & 8) != 0, first, last), last
