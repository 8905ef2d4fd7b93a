"""Orders of metadata: the kernel's arithmetic, the plain one, and walks through memory that the tests write down."""

import pytest
import torch
import triton
import triton.language as tl
from metadata_walks import WALKS
from torch import Tensor

from sparsetrain.kernels.device_functions import metadata_place as place_in_a_kernel
from sparsetrain.kernels.metadata_order import Order, metadata_places, metadata_words

SHAPES = [(128, 128), (256, 384), (80, 48), (16, 16)]


@triton.jit  # type: ignore[untyped-decorator]
def places_kernel(places, table, rows, words, order: tl.constexpr, height: tl.constexpr, width: tl.constexpr):
    row, word = tl.arange(0, height)[:, None].to(tl.int64), tl.arange(0, width)[None, :]
    inside = (row < rows) & (word < words)
    place = place_in_a_kernel(row, word, inside, words, rows, order, table)
    tl.store(places + row * words + word, place, mask=inside)


def by_kernel(rows: int, words: int, order: Order, device: str, table: Tensor | None = None) -> Tensor:
    places = torch.full((rows, words), -1, dtype=torch.int64, device=device)
    given = places if table is None else table.to(device)
    places_kernel[(1,)](places, given, rows, words, int(order), triton.next_power_of_2(rows), 32)
    return places.cpu()


@pytest.mark.parametrize("order", WALKS, ids=lambda order: order.name)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_words_lie_where_a_walk_through_memory_meets_them(
    order: Order, rows: int, columns: int, kernel_device: str
) -> None:
    words = columns // 16
    size = metadata_words(rows, columns, order)
    whole = {Order.CUTLASS: 32, Order.CUSPARSELT_SM80: 128}.get(order, 1)
    if rows % whole or columns % whole:
        assert size == 0
        return
    walk = list(WALKS[order](rows, words))
    assert size == len(walk) >= rows * words
    expected = torch.full((rows, words), -1, dtype=torch.int64)
    for place, (row, word) in enumerate(walk):
        if row < rows and word < words:  # the rest is padding
            expected[row, word] = place
    assert torch.equal(metadata_places(rows, columns, order, torch.device("cpu")), expected)
    assert torch.equal(by_kernel(rows, words, order, kernel_device), expected)


def test_a_table_says_where_words_lie(kernel_device: str) -> None:
    table = torch.randperm(48 * 5).int()
    expected = table.view(48, 5).long()
    assert torch.equal(metadata_places(48, 80, Order.TABLE, torch.device("cpu"), table), expected)
    assert torch.equal(by_kernel(48, 5, Order.TABLE, kernel_device, table), expected)
