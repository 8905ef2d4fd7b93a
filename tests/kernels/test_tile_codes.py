"""Tile codes by integer arithmetic against their definition, for every code."""

import torch

from sparsetrain.kernels.tile_codes import count_bits, pack_codes, reference, transpose_codes, unpack_codes

EVERY = torch.arange(-32768, 32768).to(torch.int16).view(128, 512)


def test_every_code_equals_the_definition() -> None:
    assert torch.equal(unpack_codes(EVERY), reference.unpack_codes(EVERY))
    assert torch.equal(pack_codes(unpack_codes(EVERY)), EVERY)
    assert torch.equal(reference.pack_codes(unpack_codes(EVERY)), EVERY)
    assert torch.equal(transpose_codes(EVERY), reference.transpose_codes(EVERY))
    assert torch.equal(count_bits(EVERY), reference.count_bits(EVERY))


def test_bit_4_row_plus_column_is_the_entry() -> None:
    for row in range(4):
        for column in range(4):
            mask = torch.zeros(4, 4, dtype=torch.bool)
            mask[row, column] = True
            for pack in (pack_codes, reference.pack_codes):
                assert pack(mask).item() & 0xFFFF == 1 << 4 * row + column


def test_batches_are_packed_matrix_by_matrix() -> None:
    mask = torch.rand(2, 3, 8, 12) < 0.5
    codes = pack_codes(mask)
    assert tuple(codes.shape) == (2, 3, 2, 3)
    assert torch.equal(codes[1, 2], pack_codes(mask[1, 2]))
    assert torch.equal(unpack_codes(codes), mask)
