import torch

from sparsetrain.kernels.tile_codes.reference import count_bits, pack_codes, transpose_codes, unpack_codes


def test_every_code_survives_unpacking_and_packing() -> None:
    codes = torch.arange(-32768, 32768).to(torch.int16).view(256, 256)
    assert torch.equal(pack_codes(unpack_codes(codes)), codes)


def test_bit_4_row_plus_column_is_the_entry() -> None:
    for row in range(4):
        for column in range(4):
            mask = torch.zeros(4, 4, dtype=torch.bool)
            mask[row, column] = True
            assert pack_codes(mask).item() & 0xFFFF == 1 << 4 * row + column


def test_every_code_is_transposed_as_its_mask_is() -> None:
    codes = torch.arange(-32768, 32768).to(torch.int16).view(128, 512)
    assert torch.equal(unpack_codes(transpose_codes(codes)), unpack_codes(codes).t())


def test_bits_are_counted_for_every_code() -> None:
    codes = torch.arange(-32768, 32768).to(torch.int16)
    expected = [bin(code & 0xFFFF).count("1") for code in codes.tolist()]
    assert count_bits(codes).tolist() == expected


def test_batches_are_packed_matrix_by_matrix() -> None:
    mask = torch.rand(2, 3, 8, 12) < 0.5
    codes = pack_codes(mask)
    assert tuple(codes.shape) == (2, 3, 2, 3)
    assert torch.equal(codes[1, 2], pack_codes(mask[1, 2]))
    assert torch.equal(unpack_codes(codes), mask)
