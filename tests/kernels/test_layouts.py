"""Layouts against torch's own conversion, and against walks through the blocks in the order of memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsetrain.kernels.layouts import (
    cusparselt_sm80_place,
    cutlass_place,
    from_cusparselt_sm80,
    from_cutlass,
    to_cusparselt_sm80,
    to_cutlass,
)
from sparsetrain.kernels.pack import pack_tiles, search_and_pack
from sparsetrain.kernels.tile_codes.reference import unpack_codes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (64, 32 * 6), (96, 128), (256, 512), (1024, 64)])
def test_cutlass_equals_torchs_conversion(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) + 3  # no zeros, whose places the conversion would choose again
    codes, values, meta, values_t, meta_t = search_and_pack(weight, dtype)
    masked = weight.to(dtype) * unpack_codes(codes)
    expected_values, expected_meta = sparse_semi_structured_from_dense_cutlass(masked)
    assert torch.equal(values, expected_values)
    assert torch.equal(to_cutlass(meta), expected_meta)
    if shape[0] % 64 == 0:
        expected_values, expected_meta = sparse_semi_structured_from_dense_cutlass(masked.t().contiguous())
        assert torch.equal(values_t, expected_values)
        assert torch.equal(to_cutlass(meta_t), expected_meta)


def block() -> list[tuple[int, int]]:
    """Rows and words of a block, in the order of memory."""
    lines = []
    for row in range(8):
        for lower in (0, 16):
            for word in (0, 1):
                lines += [(row + lower, word), (row + lower + 8, word)]
    return lines


def walk_cutlass(rows: int, words: int) -> list[tuple[int, int]]:
    return [
        (top + row, left + word)
        for left in range(0, words, 2)
        for top in range(0, rows, 32)
        for row, word in block()
    ]  # fmt: skip


def walk_cusparselt(rows: int, words: int) -> list[tuple[int, int]]:
    return [
        (tile_top + top + row, tile_left + left + word)
        for tile_left in range(0, words, 4)
        for tile_top in range(0, rows, 128)
        for left in (0, 2)
        for top in (0, 32, 64, 96)
        for row, word in block()
    ]


@pytest.mark.parametrize(
    ("place", "walk"),
    [(cutlass_place, walk_cutlass), (cusparselt_sm80_place, walk_cusparselt)],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(("rows", "words"), [(128, 8), (256, 8), (128, 24), (384, 16)])
def test_places_follow_the_walk(
    place: Callable[..., int], walk: Callable[[int, int], list[tuple[int, int]]], rows: int, words: int
) -> None:
    steps = walk(rows, words)
    assert len(set(steps)) == rows * words
    assert [place(row, word, rows) for row, word in steps] == list(range(rows * words))


def random_packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(rows, columns)
    codes = search_and_pack(weight, torch.bfloat16)[0]
    return pack_tiles(weight, codes, torch.bfloat16)[:2]


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (256, 384), (512, 128)])
def test_every_layout_is_undone(rows: int, columns: int) -> None:
    values, meta = random_packed(rows, columns)
    assert torch.equal(from_cutlass(to_cutlass(meta)), meta)
    buffer = to_cusparselt_sm80(values, meta)
    assert buffer.numel() * 16 == rows * columns * 9
    assert torch.equal(buffer[: values.numel()].view_as(values), values)
    assert all(map(torch.equal, from_cusparselt_sm80(buffer, rows, columns), (values, meta)))


WORDS = torch.zeros(128, 8, dtype=torch.int16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: to_cutlass(WORDS[:48]), r"meta is torch.int16 \(48, 8\): the CUTLASS layout"),
        (lambda: from_cutlass(WORDS.int()), "meta is torch.int32"),
        (lambda: to_cusparselt_sm80(torch.zeros(128, 32).half(), WORDS[:, :4]), "R a multiple of 128 and C of 128"),
        (lambda: to_cusparselt_sm80(torch.zeros(128, 64), WORDS), "values is torch.float32"),
        (lambda: from_cusparselt_sm80(torch.zeros(9).half(), 128, 128), r"buffer has shape \(9,\)"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
