"""The exact transposable search as a Triton kernel; arithmetic and ties are those of ``cpu.py``, bit for bit."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device_functions import split_columns, spread_nibble, tensor_pointer, tiles_of_program
from ..launch import on_device_of
from ..plan import are_aligned, groups_of_equal_layout
from ..pointer_tables import members

WIDE, NARROW = (1, 256), (4, 64)  # tiles of one program: rows, columns
WARPS = 4


def search_into(
    scores: Sequence[Tensor], codes: Sequence[Tensor], magnitude: bool, masks: Sequence[Tensor] = ()
) -> None:
    """Search masks of several tensors; tensors of equal layout share one launch.

    Args:
        scores: float32, float16 or bfloat16 ``[O, I]`` each, columns contiguous, rows at any stride.
        codes: int16 ``[O/4, I/4]`` each, contiguous; overwritten.
        magnitude: Rank by ``|score|``.
        masks: Empty, or bool ``[O, I]`` each, contiguous; overwritten.
    """
    outputs = masks or codes
    for group in groups_of_equal_layout(scores, codes, outputs):
        sources, targets = [scores[i] for i in group], [codes[i] for i in group]
        bytes_of = [outputs[i].view(torch.int32) for i in group] if masks else targets
        tile_rows, tile_columns = targets[0].shape
        rows, columns = WIDE if tile_columns > NARROW[1] else NARROW
        grid = (triton.cdiv(tile_rows, rows) * triton.cdiv(tile_columns, columns), len(group))
        with on_device_of(sources[0]):
            search_kernel[grid](
                *members(sources), *members(targets), *members(bytes_of), tile_rows, tile_columns, sources[0].stride(0),
                MAGNITUDE=magnitude, ALIGNED=are_aligned(sources, targets, bytes_of), MASK=bool(masks), ROWS=rows,
                COLUMNS=columns, num_warps=WARPS,
            )  # fmt: skip


@triton.jit
def load_row(row_pointers, inside, MAGNITUDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load one row of every tile ``[ROWS, 4·COLUMNS]`` as keys; returns its four columns ``[ROWS, COLUMNS]``."""
    return split_columns(ranking_key(tl.load(row_pointers, mask=inside, other=0.0), MAGNITUDE), ROWS, COLUMNS)


@triton.jit
def ranking_key(score, MAGNITUDE: tl.constexpr):
    """Clamp to ±2^100 in float32; NaN is +2^100, -0 is +0."""
    limit: tl.constexpr = 1267650600228229401496703205376.0
    key = score.to(tl.float32)  # before any arithmetic: the interpreter's bfloat16 arithmetic is wrong
    if MAGNITUDE:
        key = tl.abs(key)
        return tl.where(key < limit, key, limit)
    key = tl.where(key < limit, key, limit)
    return tl.where(key > -limit, key, -limit) + 0.0


@triton.jit
def contrasts(c0, c1, c2, c3):
    """A row's half against half, and left against right column of either half."""
    return (c0 + c1) - (c2 + c3), c0 - c1, c2 - c3


@triton.jit
def pair_gain(half, left, right):
    """What a leader's best two columns gain over an even split."""
    return tl.maximum(tl.abs(half), tl.abs(left) + tl.abs(right))


@triton.jit
def leader_nibble(half, left, right):
    """The columns a leader keeps: the better half, or the better column of each half."""
    whole = tl.where(half < 0, 0b1100, 0b0011)
    each = tl.where(left < 0, 0b0010, 0b0001) | tl.where(right < 0, 0b1000, 0b0100)
    return tl.where(tl.abs(half) < tl.abs(left) + tl.abs(right), each, whole)


@triton.jit
def choose(first, second, third, take_second, take_third):
    """Select by the pairing that won."""
    return tl.where(take_third, third, tl.where(take_second, second, first))


@triton.jit
def best_nibbles(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3):
    """The kept columns of the four rows a, b, c, d of every tile, as int32 nibbles."""
    ah, al, ar = contrasts(a0, a1, a2, a3)
    bh, bl, br = contrasts(b0, b1, b2, b3)
    ch, cl, cr = contrasts(c0, c1, c2, c3)
    dh, dl, dr = contrasts(d0, d1, d2, d3)
    # leaders of the pairings (ab)(cd), (ac)(bd), (ad)(bc): row a, and row c, b, b
    total1 = pair_gain(ah - bh, al - bl, ar - br) + pair_gain(ch - dh, cl - dl, cr - dr)
    total2 = pair_gain(ah - ch, al - cl, ar - cr) + pair_gain(bh - dh, bl - dl, br - dr)
    total3 = pair_gain(ah - dh, al - dl, ar - dr) + pair_gain(bh - ch, bl - cl, br - cr)
    second = total1 < total2
    third = tl.maximum(total1, total2) < total3
    first_leader = leader_nibble(
        choose(ah - bh, ah - ch, ah - dh, second, third),
        choose(al - bl, al - cl, al - dl, second, third),
        choose(ar - br, ar - cr, ar - dr, second, third),
    )
    second_leader = leader_nibble(
        choose(ch - dh, bh - dh, bh - ch, second, third),
        choose(cl - dl, bl - dl, bl - cl, second, third),
        choose(cr - dr, br - dr, br - cr, second, third),
    )
    first_partner, second_partner = first_leader ^ 15, second_leader ^ 15
    row_b = choose(first_partner, second_leader, second_leader, second, third)
    row_c = choose(second_leader, first_partner, second_partner, second, third)
    row_d = choose(second_partner, second_partner, first_partner, second, third)
    return first_leader, row_b, row_c, row_d


@triton.jit
def search_kernel(
    score_base, score_offsets, code_base, code_offsets, mask_base, mask_offsets, tile_rows, tile_columns, stride,
    MAGNITUDE: tl.constexpr, ALIGNED: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Search ROWS × COLUMNS tiles of the program's tensor; writes codes, and a byte mask if MASK."""
    tensor = tl.program_id(1)
    scores = tensor_pointer(score_base, score_offsets, tensor, ALIGNED)
    codes = tensor_pointer(code_base, code_offsets, tensor, ALIGNED)
    _, left, row, column = tiles_of_program(tile_columns, ROWS, COLUMNS)
    element = left * 4 + tl.arange(0, 4 * COLUMNS)[None, :]
    inside = (row < tile_rows) & (element < tile_columns * 4)
    pointers = scores + row * 4 * stride + element
    a0, a1, a2, a3 = load_row(pointers, inside, MAGNITUDE, ROWS, COLUMNS)
    b0, b1, b2, b3 = load_row(pointers + stride, inside, MAGNITUDE, ROWS, COLUMNS)
    c0, c1, c2, c3 = load_row(pointers + 2 * stride, inside, MAGNITUDE, ROWS, COLUMNS)
    d0, d1, d2, d3 = load_row(pointers + 3 * stride, inside, MAGNITUDE, ROWS, COLUMNS)
    # [ROWS, COLUMNS] each, four columns of four rows of every tile
    a, b, c, d = best_nibbles(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3)
    inside = (row < tile_rows) & (column < tile_columns)
    code = (a | (b << 4) | (c << 8) | (d << 12)).to(tl.int16)
    tl.store(codes + row * tile_columns + column, code, mask=inside)
    if MASK:
        mask = tensor_pointer(mask_base, mask_offsets, tensor, ALIGNED)
        quads = mask + row * 4 * tile_columns + column  # int32: the four bytes of a tile's row
        tl.store(quads, spread_nibble(a), mask=inside)
        tl.store(quads + tile_columns, spread_nibble(b), mask=inside)
        tl.store(quads + 2 * tile_columns, spread_nibble(c), mask=inside)
        tl.store(quads + 3 * tile_columns, spread_nibble(d), mask=inside)
