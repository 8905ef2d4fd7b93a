"""Search, packing in final order and statistics in one launch, against the walks and sums that the tests write down."""

import pytest
import torch
from packed_matrices import Matrix, columns, same, side
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.mask_search import search_transposable
from sparsetrain.kernels.metadata_order import Order
from sparsetrain.kernels.pack import operator, pack_tiles_, reference, search_and_pack_
from sparsetrain.kernels.pack.triton_kernel import pack_into
from sparsetrain.kernels.statistics.reference import measure
from sparsetrain.kernels.tile_codes import unpack_codes


def some_weights(dtype: torch.dtype, shapes: list[tuple[int, int]]) -> list[Tensor]:
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights[0][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    weights[-1][::3] = 0
    return weights


CASES = [
    (Order.NATURAL, Order.TABLE, (48, 80), torch.bfloat16),
    (Order.CUTLASS, Order.NATURAL, (32, 64), torch.float32),
    (Order.CUSPARSELT_SM80, Order.CUTLASS, (128, 128), torch.float32),
    (Order.CUTLASS_SM90_1, Order.CUTLASS_SM90_4, (80, 48), torch.float32),
    (Order.CUTLASS_SM90_2, Order.CUTLASS_SM90_2, (16, 144), torch.float16),
    (Order.TABLE, Order.TABLE, (32, 48), torch.float32),
]


@pytest.mark.parametrize(("order", "order_t", "shape", "dtype"), CASES)
def test_one_launch_searches_packs_both_sides_in_their_orders_and_measures(
    order: Order, order_t: Order, shape: tuple[int, int], dtype: torch.dtype, margins: Margins
) -> None:
    shapes = [shape] * 2
    weights = some_weights(dtype, shapes)
    before = [torch.randint(-(2**15), 2**15, (h // 4, w // 4)).to(torch.int16) for h, w in shapes]
    codes = [margins.of(code) for code in before]
    packed = [Matrix(margins, *shape, order, seed) for seed, shape in enumerate(shapes)]
    packed_t = [Matrix(margins, *shape[::-1], order_t, seed + 7) for seed, shape in enumerate(shapes)]
    statistics = margins.empty(2, 6, dtype=torch.float64)
    given = [margins.of(weight, gap=16) for weight in weights]
    pack_into(given, codes, side(packed), side(packed_t), search=True, statistics=statistics)
    for position, weight in enumerate(weights):
        found = search_transposable(weight, magnitude=True)
        assert torch.equal(codes[position].cpu(), found)
        values, meta, values_t, meta_t = reference.pack(weight, found, torch.bfloat16)
        packed[position].check(values, meta)
        packed_t[position].check(values_t, meta_t)
        wanted = measure(weight, found, before[position])
        torch.testing.assert_close(statistics[position].cpu(), wanted, rtol=1e-6, atol=0)
        assert torch.equal(statistics[position, 2:].cpu(), wanted[2:])


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
def test_the_operator_does_off_cuda_what_the_kernel_does(sides: tuple[bool, bool], margins: Margins) -> None:
    shapes = [(16, 48), (32, 144), (16, 48)]
    weights = some_weights(torch.float32, shapes)
    results = []
    for by_kernel in (True, False):
        codes = [margins.of(torch.full((h // 4, w // 4), 0x5A5A, dtype=torch.int16)) for h, w in shapes]
        matrices = [
            [Matrix(margins, *(shape[::-1] if turned else shape), order, 3) for shape in shapes] if wanted else []
            for turned, wanted, order in ((False, sides[0], Order.TABLE), (True, sides[1], Order.CUTLASS_SM90_2))
        ]
        if by_kernel:
            statistics = margins.empty(3, 6, dtype=torch.float64)
            first, second = (side(column) if column else None for column in matrices)
            pack_into([margins.of(weight) for weight in weights], codes, first, second, True, statistics)
        else:
            lists, tables, orders = columns(*matrices)
            statistics = search_and_pack_([margins.of(w) for w in weights], codes, *lists, tables, orders)
        parts = [part for column in matrices for each in column for part in (each.values, each.meta)]
        results.append(([part.cpu() for part in (*codes, *parts)], statistics.cpu()))
    (kernel, sums), (plain, wanted) = results
    assert all(map(same, kernel, plain))
    torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=0)


def test_weights_that_are_zero_where_they_are_pruned_lose_nothing(margins: Margins) -> None:
    weight = torch.randn(64, 64)
    weight *= unpack_codes(search_transposable(weight, magnitude=True))
    statistics, codes = margins.empty(1, 6, dtype=torch.float64), margins.empty(16, 16, dtype=torch.int16)
    pack_into([margins.of(weight)], [codes], None, None, search=True, statistics=statistics)
    assert statistics[0, 1] == 0


def test_operators_with_orders_pass_opcheck(kernel_device: str, margins: Margins) -> None:
    weight = torch.randn(64, 32, device=kernel_device)
    codes, values, _, values_t, _ = operator.search_and_pack(weight, torch.float16)
    meta = margins.empty(128, dtype=torch.int16)
    table = torch.randperm(128, device=kernel_device).int()
    sides = ([values], [meta], [values_t], [margins.like(meta)])
    orders = [int(Order.CUTLASS_SM90_1), int(Order.TABLE)]
    torch.library.opcheck(pack_tiles_, ([weight], [codes], *sides, [table], orders))
    torch.library.opcheck(search_and_pack_, ([weight], [codes], *sides, [table], orders))
    torch.library.opcheck(search_and_pack_, ([weight], [codes], [], [], [], [], []))
    assert search_and_pack_([weight[:0]], [codes[:0]], [], [], [], [], []).tolist() == [[0.0] * 6]


HALF, WORDS = torch.zeros(64, 16, dtype=torch.half), torch.zeros(128, dtype=torch.int16)
WEIGHT, CODES = torch.zeros(64, 32), torch.zeros(16, 8, dtype=torch.int16)


@pytest.mark.parametrize(
    ("meta", "tables", "orders", "words"),
    [
        (WORDS[:-1], [], [Order.CUTLASS_SM90_1], r"meta\[0\] is torch.int16 \(127,\) on cpu: .* \(128,\)"),
        (WORDS, [], [Order.CUSPARSELT_SM80], r"order of meta\[0\] is CUSPARSELT_SM80: a matrix \[64, 32\] has none"),
        (WORDS, [], [Order.TABLE], "orders and tables have 1 and 0 entries"),
        (WORDS, [], [], "orders and tables have 0 and 0 entries"),
        (WORDS, [WORDS], [Order.TABLE], r"the table of meta\[0\] is torch.int16 \(128,\)"),
        (WORDS, [], None, r"meta\[0\] is torch.int16 \(128,\) on cpu: .* \(64, 2\)"),
    ],
)
def test_bad_orders_are_one_sentence_and_change_nothing(
    meta: Tensor, tables: list[Tensor], orders: list[int] | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        search_and_pack_([WEIGHT], [CODES], [HALF], [meta], [], [], tables, orders)
    assert "\n" not in str(caught.value)
    assert not CODES.any()
