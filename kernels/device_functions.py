"""What several kernels compute with: members of a group of tensors, columns of tiles, kept pairs, rounding."""

import triton
import triton.language as tl

from .metadata_order import Order

NATURAL = tl.constexpr(int(Order.NATURAL))
TABLE = tl.constexpr(int(Order.TABLE))
CUTLASS = tl.constexpr(int(Order.CUTLASS))
CUSPARSELT_SM80 = tl.constexpr(int(Order.CUSPARSELT_SM80))
CUTLASS_SM90_2 = tl.constexpr(int(Order.CUTLASS_SM90_2))
CUTLASS_SM90_4 = tl.constexpr(int(Order.CUTLASS_SM90_4))


@triton.jit
def tiles_of_program(tile_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a program's ROWS × COLUMNS tiles begin, in tiles, and all their rows [ROWS, 1] and columns [1, COLUMNS]."""
    blocks = tl.cdiv(tile_columns, COLUMNS)
    top = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    left = (tl.program_id(0) % blocks) * COLUMNS
    return top, left, top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def split_columns(row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[ROWS, 4·COLUMNS]`` to four ``[ROWS, COLUMNS]``, without moving anything between threads."""
    even, odd = tl.split(tl.reshape(row, (ROWS, COLUMNS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def spread_nibble(nibble):
    """Bit b of a nibble to byte b."""
    return (nibble * 0x00204081) & 0x01010101


@triton.jit
def tensor_pointer(base, offsets, index, ALIGNED: tl.constexpr):
    """The pointer to a tensor of a group, at its offset in elements; ALIGNED promises a multiple of 16."""
    offset = tl.load(offsets + index)
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return base + offset


@triton.jit
def join_columns(c0, c1, c2, c3, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of ``split_columns``."""
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (ROWS, 4 * COLUMNS))


@triton.jit
def load_code(pointers, inside):
    """Tile codes as int32 without their sign; 0 outside."""
    return tl.load(pointers, mask=inside, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def count_bits(code):
    """The number of set bits of 16."""
    pairs = code - (code >> 1 & 0x5555)
    fours = (pairs & 0x3333) + (pairs >> 2 & 0x3333)
    eights = fours + (fours >> 4) & 0x0F0F
    return eights + (eights >> 8) & 0x1F


@triton.jit
def nibbles_of(code):
    """The kept columns of the four rows of a tile."""
    return code & 15, (code >> 4) & 15, (code >> 8) & 15, (code >> 12) & 15


@triton.jit
def transposed_nibbles(a, b, c, d):
    """The kept rows of the four columns of a tile, from the kept columns a, b, c, d of its rows."""
    spread = (a | (b << 8) | (c << 16) | (d << 24)).to(tl.uint32, bitcast=True)  # bit i of row r at 8r + i
    # the product moves bits 0, 8, 16, 24 to 28, 29, 30, 31
    first = ((spread & 0x01010101) * 0x10204080) >> 28
    second = ((spread & 0x02020202) * 0x08102040) >> 28
    third = ((spread & 0x04040404) * 0x04081020) >> 28
    fourth = ((spread & 0x08080808) * 0x02040810) >> 28
    return first.to(tl.int32), second.to(tl.int32), third.to(tl.int32), fourth.to(tl.int32)


@triton.jit
def kept_pair(nibble, x0, x1, x2, x3):
    """The two kept of four candidates."""
    first = tl.where((nibble & 1) != 0, x0, tl.where((nibble & 2) != 0, x1, x2))
    last = tl.where((nibble & 8) != 0, x3, tl.where((nibble & 4) != 0, x2, x1))
    return first, last


@triton.jit
def pruned_pair(nibble, x0, x1, x2, x3):
    """The two of four candidates that ``kept_pair`` leaves."""
    first = tl.where((nibble & 1) == 0, x0, tl.where((nibble & 2) == 0, x1, x2))
    last = tl.where((nibble & 8) == 0, x3, tl.where((nibble & 4) == 0, x2, x1))
    return first, last


@triton.jit
def meta_nibble(nibble):
    """``i0 | i1 << 2`` of the two set bits of a nibble; 0 for 0."""
    # halving tells the six nibbles apart, so eight entries of a table are enough: 0, 0011, 0101, 0110, 1001, 1010, 1100
    return (0x0EDC9840 >> ((nibble << 1) & 28)) & 15


@triton.jit
def metadata_place(row, word, inside, word_columns, rows, ORDER: tl.constexpr, table):
    """Where a word of natural metadata lies in an ORDER, as ``metadata_place`` of ``metadata_order.py`` says it.

    ``row`` is int64 and ``inside`` masks what is read of the ``table`` of places, which only ``Order.TABLE`` needs.
    """
    natural = row * word_columns + word
    if ORDER == NATURAL:
        return natural
    elif ORDER == TABLE:
        return tl.load(table + natural, mask=inside, other=0).to(tl.int64)
    elif ORDER == CUTLASS:
        block = (word >> 1) * (2 * rows) + (row >> 5) * 64
        return block + (row & 7) * 8 + ((row >> 4) & 1) * 4 + (word & 1) * 2 + ((row >> 3) & 1)
    elif ORDER == CUSPARSELT_SM80:
        tile = (word >> 2) * (rows >> 7) + (row >> 7)
        block = tile * 512 + ((word >> 1) & 1) * 256 + ((row >> 5) & 3) * 64
        return block + (row & 7) * 8 + ((row >> 4) & 1) * 4 + (word & 1) * 2 + ((row >> 3) & 1)
    else:
        blocks: tl.constexpr = 4 if ORDER == CUTLASS_SM90_4 else 2 if ORDER == CUTLASS_SM90_2 else 1
        atom = (word // (2 * blocks)) * ((rows + 63) >> 6) + (row >> 6)
        place = ((row >> 3) & 1) + ((word >> 1) % blocks) * 2 + (row & 7) * (2 * blocks)
        return atom * (128 * blocks) + place + (word & 1) * (16 * blocks) + ((row >> 4) & 3) * (32 * blocks)


@triton.jit
def pair_bits(first, last, DTYPE: tl.constexpr, EMULATE_ROUNDING: tl.constexpr):
    """Two float32 values rounded to DTYPE, or two that are its bits, as the integer that holds both, the first low."""
    if DTYPE == tl.float32:
        return first.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF | (
            last.to(tl.int32, bitcast=True).to(tl.int64) << 32
        )
    elif first.dtype.is_int():
        return (first.to(tl.int32) & 0xFFFF) | (last.to(tl.int32) << 16)
    else:
        return rounded_bits(first, DTYPE, EMULATE_ROUNDING) | (rounded_bits(last, DTYPE, EMULATE_ROUNDING) << 16)


@triton.jit
def rounded_bits(value, DTYPE: tl.constexpr, EMULATE_ROUNDING: tl.constexpr):
    """A float32 value rounded to a 16-bit DTYPE, as int32 bits; EMULATE_ROUNDING as the interpreter truncates."""
    if EMULATE_ROUNDING and DTYPE == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF
        return tl.where(value == value, even, 0x7FC0)
    else:
        return value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def rounded(value, DTYPE: tl.constexpr, EMULATE_ROUNDING: tl.constexpr):
    """A float32 value in DTYPE, rounded to nearest even."""
    if EMULATE_ROUNDING and DTYPE == tl.bfloat16:
        return rounded_bits(value, DTYPE, EMULATE_ROUNDING).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)
