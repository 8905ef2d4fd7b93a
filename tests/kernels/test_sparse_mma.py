"""What the packer writes, multiplied by sparse tensor core instructions as the PTX ISA defines them, lane by lane."""

import pytest
import torch
from sparse_mma import (
    MetadataError,
    expanded,
    fragment_a,
    fragment_b,
    fragment_c,
    fragment_d_of_wgmma,
    group_and_thread,
    metadata_words,
    mma_sp,
    stmatrix_x4_trans,
    wgmma_sp,
)
from torch import Tensor

from sparsetrain.kernels.layouts import to_cutlass
from sparsetrain.kernels.pack import pack_tiles, search_and_pack
from sparsetrain.kernels.tile_codes.reference import unpack_codes

HALVES = [torch.float16, torch.bfloat16]
UNREAD = 0x55555555  # undefined nibbles: a lane whose register is read raises


def small_integers(rows: int, columns: int) -> Tensor:
    """Whose products and sums are exact in every dtype, and that are not zero."""
    return torch.randint(1, 9, (rows, columns)).float() * (torch.randint(0, 2, (rows, columns)) * 2 - 1)


def problem(rows: int, columns: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed values and natural metadata of a random masked weight, tokens as B, and their exact product."""
    weight, right = small_integers(rows, columns), small_integers(columns, tokens)
    codes, values, meta, *_ = search_and_pack(weight, dtype)
    product = (weight * unpack_codes(codes)).double() @ right.double()
    return values, meta, right.to(dtype), product.float()


def register(low: Tensor, high: Tensor) -> Tensor:
    """Two int16 words as one 32-bit register."""
    return torch.stack([low, high], dim=-1).view(torch.int32).squeeze(-1)


def natural_registers(meta: Tensor, top: int, block: int, selector: int) -> Tensor:
    """A lane's register from natural ``meta [R, C/16]``: word ``2·block + t % 2`` of row g, and of row g + 8 above."""
    group, thread = group_and_thread()
    words = meta[:, 2 * block + thread % 2][top:].T  # [lane, row]
    lanes = torch.arange(32)
    read = register(words[lanes, group], words[lanes, group + 8])
    return torch.where(thread // 2 == selector, read, UNREAD)


def cutlass_registers(meta: Tensor, rows: int, top: int, block: int) -> Tensor:
    """A lane's register from CUTLASS's order: one 32-bit word per lane of a block of 32 rows × 32 columns."""
    return meta.flatten().view(torch.int32).view(-1, rows // 32, 32)[block, top // 32]


def by_warps(values: Tensor, right: Tensor, metadata_of, selector_of) -> Tensor:  # type: ignore[no-untyped-def]
    """Multiply in tiles of m16n8k32, every lane loading its own fragments from natural memory."""
    rows, tokens = values.shape[0], right.shape[1]
    result = torch.full((rows, tokens), float("nan"))
    a_row, a_place = fragment_a()
    b_row, b_column = fragment_b()
    for top in range(0, rows, 16):
        for left in range(0, tokens, 8):
            sums = torch.zeros(32, 4)
            for block in range(right.shape[0] // 32):
                a = values[top + a_row, 16 * block + a_place]
                b = right[32 * block + b_row, left + b_column]
                sums = mma_sp(a, b, sums, metadata_of(top, block), selector_of(top))
            c_row, c_column = fragment_c()
            result[top + c_row, left + c_column] = sums
    return result


def test_fragments_are_those_of_the_figures() -> None:
    a_row, a_place = fragment_a()
    assert a_row[5].tolist() == [1, 1, 9, 9, 1, 1, 9, 9]
    assert a_place[5].tolist() == [2, 3, 2, 3, 10, 11, 10, 11]
    b_row, b_column = fragment_b()
    assert b_row[6].tolist() == [4, 5, 12, 13, 20, 21, 28, 29]
    assert b_column[6].tolist() == [1] * 8
    c_row, c_column = fragment_c()
    assert (c_row[31].tolist(), c_column[31].tolist()) == ([7, 7, 15, 15], [6, 7, 6, 7])
    for shape, places in (
        ((16, 16), fragment_a()), ((32, 8), fragment_b()), ((16, 8), fragment_c()), ((64, 24), fragment_d_of_wgmma(24)),
    ):  # fmt: skip
        held = torch.zeros(shape).index_put_(places, torch.ones(places[0].shape), accumulate=True)
        assert torch.equal(held, torch.ones(shape))  # every entry is in one place


def test_the_lanes_that_a_selector_names_give_the_metadata() -> None:
    metadata = torch.arange(32, dtype=torch.int32) * 0x10001
    metadata += torch.full((32,), 0x01000000, dtype=torch.int32)  # the high half is told from the low one
    for selector in (0, 1):
        words = metadata_words(metadata, selector)
        first = torch.arange(8) * 4 + 2 * selector
        assert torch.equal(words[:8], torch.stack([first, first + 1], dim=1))
        assert torch.equal(words[8:], torch.stack([first, first + 1], dim=1) + 0x100)


@pytest.mark.parametrize("nibble", [0b0000, 0b0101, 0b1010, 0b1111, 0b0001, 0b1011, 0b0010])
def test_undefined_metadata_is_refused(nibble: int) -> None:
    values, meta, right, _ = problem(16, 32, 8, torch.float16)
    a, b, metadata = values[fragment_a()], right[fragment_b()], natural_registers(meta, 0, 0, 0)
    mma_sp(a, b, torch.zeros(32, 4), metadata, 0)
    metadata[0] = metadata[0] & ~(0xF << 8) | nibble << 8
    with pytest.raises(MetadataError, match=f"row 0, chunk 2 is {nibble:#06b}"):
        mma_sp(a, b, torch.zeros(32, 4), metadata, 0)
    with pytest.raises(MetadataError):
        mma_sp(a, b, torch.zeros(32, 4), metadata, 1)  # lanes that hold none
    with pytest.raises(ValueError, match="selector is 2"):
        mma_sp(a, b, torch.zeros(32, 4), metadata, 2)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_natural_order_multiplies_right(dtype: torch.dtype, selector: int) -> None:
    values, meta, right, product = problem(32, 96, 16, dtype)
    found = by_warps(
        values, right, lambda top, block: natural_registers(meta, top, block, selector), lambda top: selector
    )
    assert torch.equal(found, product)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_order_for_cutlass_multiplies_right(dtype: torch.dtype) -> None:
    values, meta, right, product = problem(64, 96, 8, dtype)
    ordered = to_cutlass(meta)
    found = by_warps(
        values, right, lambda top, block: cutlass_registers(ordered, 64, top, block), lambda top: top // 16 % 2
    )
    assert torch.equal(found, product)


def test_the_packed_transpose_multiplies_right() -> None:
    weight, right = small_integers(32, 64), small_integers(32, 8)
    codes = search_and_pack(weight, torch.bfloat16)[0]
    values_t, meta_t = pack_tiles(weight, codes, torch.bfloat16)[2:]
    found = by_warps(
        values_t, right.bfloat16(), lambda top, block: natural_registers(meta_t, top, block, 0), lambda top: 0
    )
    assert torch.equal(found, (weight * unpack_codes(codes)).t() @ right)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_warpgroup_multiplies_natural_order_right(dtype: torch.dtype) -> None:
    values, meta, right, product = problem(128, 64, 24, dtype)
    result = torch.full_like(product, float("nan"))
    for top in range(0, 128, 64):
        sums = torch.zeros(128, 12)
        for block in range(2):
            registers = [natural_registers(meta, row, block, 0) for row in range(top, top + 64, 16)]
            a, b = values[top : top + 64, 16 * block : 16 * block + 16], right[32 * block : 32 * block + 32]
            sums = wgmma_sp(a, b, sums, torch.cat(registers), 0)
        rows, columns = fragment_d_of_wgmma(24)
        result[top + rows, columns] = sums
    assert torch.equal(result, product)


def swapped_rows(registers: Tensor) -> Tensor:
    return (registers >> 16 & 0xFFFF) | registers << 16


def swapped_lanes(registers: Tensor) -> Tensor:
    return registers.view(-1, 2).flip(1).flatten()


def shuffled_lanes(registers: Tensor) -> Tensor:
    return registers.view(8, 4).roll(1, 0).flatten()


@pytest.mark.parametrize("mistake", [swapped_rows, swapped_lanes, shuffled_lanes])
@pytest.mark.parametrize("ordered", [False, True])
def test_mistakes_in_the_metadata_are_seen(mistake, ordered: bool) -> None:  # type: ignore[no-untyped-def]
    values, meta, right, product = problem(32, 64, 8, torch.float16)
    meta_of_cutlass = to_cutlass(meta)

    def registers(top: int, block: int) -> Tensor:
        read = cutlass_registers(meta_of_cutlass, 32, top, block)
        return mistake(read if ordered else natural_registers(meta, top, block, top // 16))

    found = by_warps(values, right, registers, lambda top: top // 16)
    assert not torch.equal(found, product)
    other = by_warps(
        values, right, lambda top, block: cutlass_registers(meta_of_cutlass, 32, top, block), lambda top: 0
    )
    assert not torch.equal(other, product)  # rows 16 to 31 are those of the other selector


def test_words_in_another_order_are_seen() -> None:
    values, meta, right, product = problem(64, 64, 8, torch.float16)
    ordered = to_cutlass(meta).flatten()
    for wrong in (meta.flatten(), ordered.view(-1, 2).flip(1).flatten(), ordered.view(2, 2, 64).transpose(0, 1)):
        found = by_warps(
            values, right, lambda top, block, wrong=wrong: cutlass_registers(wrong.contiguous(), 64, top, block),
            lambda top: top // 16 % 2,
        )  # fmt: skip
        assert not torch.equal(found, product)


def test_expansion_puts_pairs_where_their_nibbles_say() -> None:
    nonzeros = torch.arange(1.0, 17).view(1, 16)
    words = torch.tensor([[0xE9DC, 0x8484]])  # nibbles C D 9 E, 4 8 4 8
    expected = [1, 0, 0, 2, 0, 3, 0, 4, 0, 5, 6, 0, 0, 0, 7, 8, 9, 10, 0, 0, 11, 0, 12, 0, 13, 14, 0, 0, 15, 0, 16, 0]
    assert expanded(nonzeros, words).flatten().tolist() == expected


def test_stmatrix_turns_what_mma_sums() -> None:
    sums = torch.arange(256).view(16, 16)  # of two mma beside each other
    rows, columns = fragment_c()
    registers = torch.cat([sums[rows, columns], sums[rows, columns + 8]], dim=1).to(torch.int16)
    lane = torch.arange(32)
    turned = torch.full((256,), -1, dtype=torch.int16)
    stmatrix_x4_trans(turned, (lane // 16 * 8 + lane % 8) * 16 + lane % 16 // 8 * 8, registers)
    assert torch.equal(turned.view(16, 16), sums.t().to(torch.int16))
    with pytest.raises(ValueError, match="must be multiples of 8 entries"):
        stmatrix_x4_trans(turned, lane, registers)
