"""Wires from dense weights and back, and numbers from codes and back, as Triton kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import (
    join_columns,
    kept_pair,
    load_code,
    nibbles_of,
    pair_bits,
    split_columns,
    tiles_of_program,
)
from ..launch import interpreted, on_device_of
from ..pack.triton_sides import PAIRS, TRITON
from .numbering import NO_PATTERN, pattern_table
from .triton_kernel import entries_of

# one program, by the dense dtype: rows and columns in tiles, warps. Nothing moves between threads.
BLOCKS = {torch.float32: (4, 32, 4), torch.float16: (4, 64, 4), torch.bfloat16: (4, 64, 4)}
FLAT, WARPS = 1024, 4  # tiles of one program without a weight
ENTRIES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NONE = tl.constexpr(NO_PATTERN)


def to_wire_into(weight: Tensor, codes: Tensor, values: Tensor, numbers: Tensor) -> None:
    """Write the wire of a weight, and zeros into rows beyond it.

    Args:
        weight: float32, float16 or bfloat16 ``[O, I]``, columns contiguous, rows at any stride.
        codes: int16 ``[O/4, I/4]``, contiguous.
        values: ``[R, I/2]``, contiguous, R at least O; overwritten.
        numbers: uint8 ``[R/4, I/4]``, contiguous; overwritten.
    """
    rows, columns, warps = BLOCKS[weight.dtype]
    tile_rows, tile_columns = numbers.shape
    source = weight.view(ENTRIES[weight.dtype]) if weight.dtype == values.dtype else weight  # nothing to round
    with on_device_of(values):
        to_wire_kernel[(triton.cdiv(tile_rows, rows) * triton.cdiv(tile_columns, columns),)](
            source, codes, values.view(PAIRS[values.dtype]), numbers, codes.shape[0], tile_rows, tile_columns,
            weight.stride(0), DTYPE=TRITON[values.dtype], EMULATE_ROUNDING=interpreted(), ROWS=rows, COLUMNS=columns,
            num_warps=warps,
        )  # fmt: skip


def from_wire_into(values: Tensor, numbers: Tensor, dense: Tensor) -> None:
    """Write the masked weight of a wire.

    Args:
        values: float32, float16 or bfloat16 ``[O, I/2]``, contiguous.
        numbers: uint8 ``[O/4, I/4]``, contiguous.
        dense: The values' dtype ``[O, I]``, contiguous; overwritten.
    """
    rows, columns, warps = BLOCKS[dense.dtype]
    tile_rows, tile_columns = numbers.shape
    with on_device_of(values):
        from_wire_kernel[(triton.cdiv(tile_rows, rows) * triton.cdiv(tile_columns, columns),)](
            values.view(PAIRS[values.dtype]), numbers, pattern_table(values.device), dense.view(ENTRIES[dense.dtype]),
            tile_rows, tile_columns, DTYPE=TRITON[dense.dtype], ROWS=rows, COLUMNS=columns, num_warps=warps,
        )  # fmt: skip


def codes_into(numbers: Tensor, codes: Tensor) -> None:
    """Write the codes of uint8 numbers; both contiguous, of one shape."""
    with on_device_of(numbers):
        codes_kernel[(triton.cdiv(codes.numel(), FLAT),)](
            numbers, pattern_table(numbers.device), codes, codes.numel(), BLOCK=FLAT, num_warps=WARPS
        )


def numbers_into(codes: Tensor, numbers: Tensor) -> None:
    """Write the numbers of int16 codes; both contiguous, of one shape."""
    with on_device_of(codes):
        numbers_kernel[(triton.cdiv(codes.numel(), FLAT),)](codes, numbers, codes.numel(), BLOCK=FLAT, num_warps=WARPS)


@triton.jit
def to_wire_kernel(
    weight, codes, pairs, numbers, tile_rows, written_rows, tile_columns, stride, DTYPE: tl.constexpr,
    EMULATE_ROUNDING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ROWS × COLUMNS tiles of a wire with ``written_rows`` rows of them, zeros from ``tile_rows`` on."""
    _, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    inside = (row < tile_rows) & (column < tile_columns)  # [ROWS, COLUMNS] tiles
    written = (row < written_rows) & (column < tile_columns)
    code = load_code(codes + row * tile_columns + column, inside)
    a, b, c, d = nibbles_of(code)
    number = tl.where(inside, number_of(code, a, b, c, d), 0)
    tl.store(numbers + row * tile_columns + column, number.to(tl.uint8), mask=written)
    nibbles = (a, b, c, d)
    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)  # [ROWS, 4·COLUMNS] entries of one row of every tile
    for line in tl.static_range(4):
        entries = tl.load(weight + (row * 4 + line) * stride + element, mask=within, other=0)
        if not entries.dtype.is_int():
            entries = entries.to(tl.float32)
        x0, x1, x2, x3 = split_columns(entries, ROWS, COLUMNS)
        first, last = kept_pair(nibbles[line], x0, x1, x2, x3)
        pair = pair_bits(first, last, DTYPE, EMULATE_ROUNDING)
        tl.store(pairs + (row * 4 + line) * tile_columns + column, pair, mask=written)


@triton.jit
def from_wire_kernel(
    pairs, numbers, patterns, dense, tile_rows, tile_columns, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ROWS × COLUMNS tiles of a dense weight."""
    _, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    inside = (row < tile_rows) & (column < tile_columns)  # [ROWS, COLUMNS] tiles
    code = load_pattern(patterns, numbers + row * tile_columns + column, inside).to(tl.int32)
    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    within = (row < tile_rows) & (element < tile_columns * 4)  # [ROWS, 4·COLUMNS] entries of one row of every tile
    for line in tl.static_range(4):
        pair = tl.load(pairs + (row * 4 + line) * tile_columns + column, mask=inside, other=0)
        nibble = (code >> (4 * line)) & 15
        x0, x1, x2, x3 = entries_of(nibble, pair, DTYPE)
        kept = join_columns(
            tl.where((nibble & 1) != 0, x0, 0).to(dense.dtype.element_ty),
            tl.where((nibble & 2) != 0, x1, 0).to(dense.dtype.element_ty),
            tl.where((nibble & 4) != 0, x2, 0).to(dense.dtype.element_ty),
            tl.where((nibble & 8) != 0, x3, 0).to(dense.dtype.element_ty), ROWS, COLUMNS,
        )  # fmt: skip
        tl.store(dense + (row * 4 + line) * tile_columns * 4 + element, kept, mask=within)


@triton.jit
def codes_kernel(numbers, patterns, codes, tiles, BLOCK: tl.constexpr):
    """Write the codes of BLOCK tiles."""
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + tile, load_pattern(patterns, numbers + tile, tile < tiles).to(tl.int16), mask=tile < tiles)


@triton.jit
def numbers_kernel(codes, numbers, tiles, BLOCK: tl.constexpr):
    """Write the numbers of BLOCK tiles."""
    tile = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = load_code(codes + tile, tile < tiles)
    a, b, c, d = nibbles_of(code)
    tl.store(numbers + tile, number_of(code, a, b, c, d).to(tl.uint8), mask=tile < tiles)


@triton.jit
def load_pattern(patterns, numbers, inside):
    """What ``pattern_table`` has of tiles; a byte is always inside of it."""
    return tl.load(patterns + tl.load(numbers, mask=inside, other=0).to(tl.int32))


@triton.jit
def number_of(code, a, b, c, d):
    """The number of a code with the rows a, b, c, d, or NO_PATTERN."""
    # halved, the six nibbles are 1 to 6; d leaves 15 patterns: c = d has one of them, its complement six, others two
    before = (c & 14) - 2 + tl.where(d < c, -1, 0) + tl.where(15 - d < c, 4, 0)
    within = tl.where(c + d == 15, (b >> 1) - 1, tl.where(b > a, 1, 0))
    pairs = code - (code >> 1 & 0x5555)
    two_in_rows = (pairs & 0x3333) + (pairs >> 2 & 0x3333) == 0x2222
    two_in_columns = ((a ^ b ^ c ^ d) == 0) & ((a | b | c | d) == 15) & ((a & b & c & d) == 0)
    return tl.where(two_in_rows & two_in_columns, ((d >> 1) - 1) * 15 + before + within, NONE)
