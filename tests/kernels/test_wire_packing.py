"""Operands that are packed from wires, against the definition of packing and the walks that the tests write down."""

import pytest
import torch
from kernels_on_cpu import kernels_on_cpu
from packed_matrices import Matrix, columns, side
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels import plan
from sparsetrain.kernels.metadata_order import Order
from sparsetrain.kernels.pack import pack_tiles_, reference
from sparsetrain.kernels.wire import (
    CODES,
    codes_of_numbers,
    from_wire,
    pack_operator,
    pack_wires_,
    pack_wires_now_,
    to_wire,
)
from sparsetrain.kernels.wire import reference as wire_reference
from sparsetrain.kernels.wire.triton_kernel import pack_wires_into

CASES = [
    (Order.NATURAL, Order.TABLE, (48, 80)),
    (Order.CUTLASS, Order.NATURAL, (32, 64)),
    (Order.CUSPARSELT_SM80, Order.CUTLASS, (128, 128)),
    (Order.CUTLASS_SM90_1, Order.CUTLASS_SM90_4, (80, 48)),
    (Order.CUTLASS_SM90_2, Order.CUTLASS_SM90_2, (16, 144)),
    (Order.TABLE, Order.TABLE, (32, 48)),
    (Order.NATURAL, Order.NATURAL, (132, 36)),
    (Order.NATURAL, Order.NATURAL, (20, 260)),
]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
SIDES = [(True, True), (True, False), (False, True)]
Wire = tuple[Tensor, Tensor]


def some_wires(dtype: torch.dtype, shapes: list[tuple[int, int]]) -> tuple[list[Wire], list[list[Tensor]]]:
    """Wires of any bits and any patterns, and what has to be packed of each."""
    wires, expected = [], []
    for rows, entries in shapes:
        values = torch.randint(-(2**31), 2**31, (rows, entries // 2)).to(BITS[dtype]).view(dtype)
        values[0, :2] = torch.tensor([-0.0, float("nan")])
        numbers = torch.randint(90, (rows // 4, entries // 4), dtype=torch.uint8)
        wires.append((values, numbers))
        codes = torch.tensor(wire_reference.pattern_codes())[numbers.long()].to(torch.int16)
        bits = wire_reference.from_wire(values, numbers).view(BITS[dtype])  # so that a NaN keeps its own
        expected.append(reference.pack(bits, codes, BITS[dtype]))
    return wires, expected


def matrices(
    margins: Margins, shapes: list[tuple[int, int]], orders: tuple[Order, Order], dtype: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[list[Matrix], list[Matrix]]:  # fmt: skip
    packed = [Matrix(margins, *shape, orders[0], seed, dtype) for seed, shape in enumerate(shapes)]
    packed_t = [Matrix(margins, *shape[::-1], orders[1], seed + 7, dtype) for seed, shape in enumerate(shapes)]
    return packed if wanted[0] else [], packed_t if wanted[1] else []


def check(found: tuple[list[Matrix], list[Matrix]], expected: list[list[Tensor]]) -> None:
    for place, packed in enumerate(found):
        for matrix, parts in zip(packed, expected, strict=bool(packed)):
            values, meta = parts[2 * place : 2 * place + 2]
            assert torch.equal(matrix.values.cpu().view(values.dtype), values)
            matrix.check(values.view(matrix.values.dtype), meta)


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize(("order", "order_t", "shape"), CASES)
def test_the_kernel_packs_both_sides_of_wires_in_their_orders(
    order: Order, order_t: Order, shape: tuple[int, int], dtype: torch.dtype, margins: Margins
) -> None:
    shapes = [shape] * 2
    wires, expected = some_wires(dtype, shapes)
    on_device = [[margins.of(part) for part in column] for column in zip(*wires, strict=True)]
    for wanted in SIDES if dtype == torch.bfloat16 else SIDES[:1]:
        found = matrices(margins, shapes, (order, order_t), dtype, wanted)
        pack_wires_into(*on_device, *(side(each) if each else None for each in found))
        check(found, expected)


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize("wanted", SIDES)
@pytest.mark.parametrize("call", [pack_wires_, pack_wires_now_])
def test_operators_pack_wires_of_several_layouts(call, wanted, by_kernels, margins, monkeypatch) -> None:
    shapes = [(16, 48), (32, 144), (16, 48)]
    orders = (Order.TABLE, Order.CUTLASS_SM90_2) if call is pack_wires_ else (Order.CUTLASS_SM90_4, Order.NATURAL)
    monkeypatch.setattr(pack_operator, "PACKINGS", plan.Plans())
    for _ in range(2):  # the second has a plan
        wires, expected = some_wires(torch.bfloat16, shapes)
        found = matrices(margins, shapes, orders, torch.bfloat16, wanted)
        kept, numbers = map(list, zip(*wires, strict=True))
        lists, tables, given = columns(*found)
        written = [part for column in lists for part in column]
        versions = [part._version for part in written]
        arguments = (kept, numbers, *lists, tables, given)
        if not by_kernels:
            call(*arguments)
        else:
            monkeypatch.setitem(pack_operator.NOW, "cpu", pack_operator.NOW["cuda"])
            with kernels_on_cpu() as launches:
                call(*arguments)
            assert launches.names == ["pack_wire_kernel"] * (3 if tables else 2)  # tables have sizes of their own
        check(found, expected)
        assert all(part._version > before for part, before in zip(written, versions, strict=True))


def test_nothing_is_packed_of_wires_without_rows() -> None:
    values, numbers = torch.zeros(0, 8), torch.zeros(0, 4, dtype=torch.uint8)
    targets = [torch.zeros(0, 8)], [torch.zeros(0, 1, dtype=torch.int16)]
    pack_wires_([values], [numbers], *targets, [], [], [])
    with kernels_on_cpu() as launches:
        pack_wires_([values], [numbers], *targets, [], [], [])
        pack_wires_now_([values], [numbers], *targets, [], [], [])
        pack_wires_([], [], [], [], [], [], [])
    assert not launches.names


def test_a_packed_wire_is_the_masked_weight_packed() -> None:
    weight = torch.randn(36, 84)
    codes = torch.tensor(CODES).to(torch.int16)[torch.randint(90, (9, 21))]
    wire = to_wire(weight, codes, torch.bfloat16)
    assert torch.equal(codes_of_numbers(wire[1]), codes)
    sizes = ((36, 42), (36, 6), (84, 18), (84, 3))
    first, second = (
        [[torch.empty(size, dtype=(torch.bfloat16, torch.int16)[place % 2])] for place, size in enumerate(sizes)]
        for _ in range(2)
    )
    pack_tiles_([from_wire(*wire)], [codes], *first, [])
    pack_wires_([wire[0]], [wire[1]], *second, [])
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])


def test_the_operator_passes_opcheck(kernel_device: str, margins: Margins) -> None:
    wires, _ = some_wires(torch.float16, [(64, 32)])
    kept, numbers = ([part.nan_to_num().to(kernel_device) for part in column] for column in zip(*wires, strict=True))
    found = matrices(margins, [(64, 32)], (Order.CUTLASS_SM90_1, Order.TABLE), torch.float16, (True, True))
    for each in found:
        for matrix in each:
            matrix.values.zero_()
    lists, tables, orders = columns(*found)
    torch.library.opcheck(pack_wires_, (kept, numbers, *lists, tables, orders))


HALF, NUMBER, META = torch.zeros(4, 2), torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.int16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([HALF], [], [HALF], [META], [], []), r"kept, numbers, .* have \[1, 0, 1, 1, 0, 0\] entries"),
        (([HALF], [NUMBER.int()], [HALF], [META], [], []), r"numbers\[0\] is torch.int32"),
        (([HALF[:2]], [NUMBER], [HALF], [META], [], []), r"the wire's values\[0\] are torch.float32 \(2, 2\)"),
        (([HALF], [NUMBER], [HALF.half()], [META], [], []), r"values\[0\] is torch.float16 .* torch.float32 \(4, 2\)"),
        (([HALF], [NUMBER], [], [], [HALF], [HALF]), r"meta_t\[0\] is torch.float32"),
        (
            ([HALF, HALF.half()], [NUMBER] * 2, [HALF] * 2, [META] * 2, [], []),
            r"kept\[1\] is torch.float16: it must be",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[list[Tensor], ...], words: str) -> None:
    for call in (pack_wires_, pack_wires_now_):
        with pytest.raises(ValueError, match=words) as caught:
            call(*arguments, tables=[])
        assert "\n" not in str(caught.value)
