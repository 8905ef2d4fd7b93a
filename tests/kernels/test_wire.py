"""Wires by the kernels and on a CPU against the definition, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels_on_cpu import kernels_on_cpu
from packed_matrices import same
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.mask_search import search_transposable
from sparsetrain.kernels.masked_update import apply_masks_
from sparsetrain.kernels.pack import cpu as pack_cpu
from sparsetrain.kernels.wire import (
    CODES,
    NO_PATTERN,
    codes_of_numbers,
    cpu,
    from_wire,
    from_wire_,
    numbering,
    numbers_of_codes,
    reference,
    to_wire,
    to_wire_,
    triton_dense,
)

SHAPES = [(4, 4), (12, 20), (132, 36), (20, 260)]
DTYPES = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
]  # fmt: skip
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
EVERY = torch.arange(-32768, 32768).to(torch.int16).view(64, 1024)


def matrix(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if kind == "gaussian":
        return torch.randn(shape).to(dtype)
    bits = torch.randint(-(2**31), 2**31, shape).to(torch.int32)  # NaN with payloads, infinities, subnormals
    weight = bits.view(torch.float32).clone() if dtype == torch.float32 else bits.to(torch.int16).view(dtype).clone()
    for value in (float("nan"), float("inf"), -float("inf"), -0.0, 1e-41):
        weight[torch.rand(shape) < 0.1] = value
    return weight


def codes_for(shape: tuple[int, int]) -> Tensor:
    """Codes of any patterns."""
    return torch.tensor(CODES).to(torch.int16)[torch.randint(90, (shape[0] // 4, shape[1] // 4))]


def test_a_tile_by_hand() -> None:
    tile = torch.tensor([[0, 1.0, 0, -0.0], [2, 0, 3, 0], [4, 0, 0, 5], [0, 6, 7, 0]])
    codes = torch.tensor([[0x695A]], dtype=torch.int16)  # rows keep 1 3, 0 2, 0 3, 1 2
    values, numbers = to_wire(tile, codes, torch.float32)
    assert values.tolist() == [[1, 0], [2, 3], [4, 5], [6, 7]]
    assert numbers.tolist() == [[reference.pattern_codes().index(0x695A)]]
    assert same(from_wire(values, numbers), tile)
    assert torch.signbit(from_wire(values, numbers)[0, 3])


def test_numbers_count_the_patterns_in_the_order_of_their_codes() -> None:
    assert list(CODES) == reference.pattern_codes() == sorted(CODES)
    assert len(CODES) == 90


def test_every_code_has_its_number_or_none(margins: Margins) -> None:
    known = reference.pattern_codes()
    expected = [
        known.index(code & 0xFFFF) if code & 0xFFFF in known else NO_PATTERN for code in EVERY.flatten().tolist()
    ]
    numbers = margins.empty(*EVERY.shape, dtype=torch.uint8)
    triton_dense.numbers_into(margins.of(EVERY), numbers)
    for found in (numbers.cpu(), numbering.numbers_of(EVERY)):
        assert found.flatten().tolist() == expected


def test_every_number_has_its_code(margins: Margins) -> None:
    numbers, codes = torch.arange(256, dtype=torch.uint8), margins.empty(256, dtype=torch.int16)
    triton_dense.codes_into(margins.of(numbers), codes)
    for found in (codes.cpu(), codes_of_numbers(numbers)):
        assert (found.int() & 0xFFFF).tolist() == reference.pattern_codes() + [0] * 166
    assert torch.equal(numbers_of_codes(codes_of_numbers(numbers[:90])), numbers[:90])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # what is infinite in float16
@pytest.mark.parametrize(("source", "target"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "any bits"])
def test_cpu_and_kernel_make_the_wire_of_the_reference_and_zeros_beyond_it(
    kind: str, source: torch.dtype, target: torch.dtype, margins: Margins
) -> None:
    for shape in SHAPES:
        weight, codes = matrix(kind, shape, source), codes_for(shape)
        if source == torch.bfloat16 != target:
            weight[weight.abs() < 1e-37] = 0  # the interpreter widens subnormal numbers wrongly
        expected = reference.to_wire(weight, codes, target)
        if target.itemsize == 2:
            assert 32 * sum(part.nbytes for part in expected) == 17 * weight.to(target).nbytes
        equal: Callable[[Tensor, Tensor], bool] = same  # in rounding, a GPU gives a NaN a payload of its own
        if source == target:
            equal = lambda one, other: torch.equal(one.view(INTEGERS[target]), other.view(INTEGERS[target]))  # noqa: E731
        for make in (cpu.to_wire_into, triton_dense.to_wire_into):
            values = margins.empty(shape[0] + 8, shape[1] // 2, dtype=target)
            numbers = margins.empty(shape[0] // 4 + 2, shape[1] // 4, dtype=torch.uint8)
            make(margins.of(weight, gap=3), margins.of(codes), values, numbers)
            assert equal(values[: shape[0]].cpu(), expected[0])
            assert torch.equal(numbers[: shape[0] // 4].cpu(), expected[1])
            assert not values[shape[0] :].view(INTEGERS[target]).any()
            assert not numbers[shape[0] // 4 :].any()


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_wire_gives_the_masked_weight_back_bit_for_bit(dtype: torch.dtype, margins: Margins) -> None:
    for shape in SHAPES:
        weight, codes = matrix("any bits", shape, dtype), codes_for(shape)
        values, numbers = reference.to_wire(weight, codes, dtype)
        expected = weight.clone()
        apply_masks_([expected], [codes])
        for read in (cpu.from_wire_into, triton_dense.from_wire_into):
            dense = margins.empty(*shape, dtype=dtype)
            read(margins.of(values), margins.of(numbers), dense)
            assert torch.equal(dense.cpu().view(INTEGERS[dtype]), expected.view(INTEGERS[dtype]))
        assert torch.equal(reference.from_wire(values, numbers).view(INTEGERS[dtype]), expected.view(INTEGERS[dtype]))


def test_what_is_no_number_keeps_nothing(margins: Margins) -> None:
    numbers = torch.arange(90, 256, dtype=torch.uint8)[None]
    values = torch.randn(4, 332)
    dense = margins.empty(4, 664)
    triton_dense.from_wire_into(margins.of(values), margins.of(numbers), dense)
    assert not dense.any()
    assert not from_wire(values, numbers).any()


def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, codes = torch.randn(100, 52), codes_for((100, 52))
    wire = to_wire(weight, codes, torch.bfloat16)
    whole = from_wire(*wire)
    monkeypatch.setitem(pack_cpu.TILES_PER_CHUNK, "cpu", 1)
    assert torch.equal(from_wire(*wire), whole)


@pytest.mark.parametrize("start", [0, 1, 8])
def test_strided_weights_are_read_in_place(start: int, margins: Margins) -> None:
    view = margins.of(torch.randn(28, start + 132), gap=17 - start)[:, start:]
    codes = codes_for((28, 132))
    expected = reference.to_wire(view.cpu(), codes, torch.bfloat16)
    values, numbers = margins.like(expected[0]), margins.like(expected[1])
    triton_dense.to_wire_into(view, margins.of(codes), values, numbers)
    assert torch.equal(values.cpu(), expected[0])
    assert torch.equal(numbers.cpu(), expected[1])


@pytest.mark.parametrize("by_kernels", [False, True])
def test_shards_are_joined_by_their_rows(by_kernels: bool) -> None:
    weight, codes = torch.randn(24, 36), codes_for((24, 36))
    whole = to_wire(weight, codes, torch.bfloat16)
    wire = [torch.full((32, 18), 7.0, dtype=torch.bfloat16), torch.full((8, 9), 7, dtype=torch.uint8)]

    def send() -> None:
        for rank, shard in enumerate(((0, 12), (12, 24), (24, 24))):  # the last has nothing, and 8 rows to fill
            rows, tiles = slice(*shard), slice(shard[0] // 4, shard[1] // 4)
            out = slice(12 * rank, 12 * rank + 12), slice(3 * rank, 3 * rank + 3)
            to_wire_(weight[rows], codes[tiles], wire[0][out[0]], wire[1][out[1]])
        parts = [to_wire(weight[rows], codes[tiles], torch.bfloat16) for rows, tiles in (
            (slice(0, 4), slice(0, 1)), (slice(4, 4), slice(1, 1)), (slice(4, 24), slice(1, 6)))]  # fmt: skip
        for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(found), expected)
        assert from_wire(*parts[1]).shape == (0, 36)
        assert codes_of_numbers(parts[1][1]).shape == numbers_of_codes(codes[:0]).shape == (0, 9)

    if by_kernels:
        with kernels_on_cpu() as launches:
            send()
        assert launches.names == ["to_wire_kernel"] * 4  # nothing is launched for nothing
    else:
        send()
    for found, expected in zip(wire, whole, strict=True):
        assert torch.equal(found[: len(expected)], expected)
        assert not found[len(expected) :].any()


def test_operators_do_by_kernels_what_they_do_on_a_cpu() -> None:
    weight, codes = torch.randn(20, 36), codes_for((20, 36))
    expected = to_wire(weight.t(), codes.t(), torch.float16)
    dense, out = from_wire(*expected), torch.empty(36, 20, dtype=torch.float16)
    with kernels_on_cpu() as launches:
        assert all(map(torch.equal, to_wire(weight.t(), codes.t(), torch.float16), expected))
        assert torch.equal(from_wire(*expected), dense)
        from_wire_(*expected, out)
        assert torch.equal(numbers_of_codes(codes.t()), expected[1])
        assert torch.equal(codes_of_numbers(expected[1].t()), codes)
        assert (numbers_of_codes(torch.full_like(codes, -1)) == NO_PATTERN).all()
        assert to_wire(torch.ones(4, 4), torch.full((1, 1), -1, dtype=torch.int16), torch.half)[1] == NO_PATTERN
    assert torch.equal(out, dense)
    assert len(launches.names) == 7


def test_operators_pass_opcheck(kernel_device: str, margins: Margins) -> None:
    weight = torch.randn(12, 20, device=kernel_device)
    codes = search_transposable(weight, magnitude=True)
    wire = to_wire(weight, codes, torch.bfloat16)
    for call, arguments in (
        (to_wire_, (weight[:8], codes[:2], *map(margins.of, wire))),
        (from_wire_, (*wire, margins.empty(12, 20, dtype=torch.bfloat16))),
        (numbers_of_codes, (codes,)),
        (codes_of_numbers, (wire[1],)),
    ):
        torch.library.opcheck(call, arguments)


TILE, CODE = torch.zeros(4, 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16)
HALF, NUMBER = torch.zeros(4, 2), torch.zeros(1, 1, dtype=torch.uint8)
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (to_wire, (torch.zeros(6, 4), CODE, torch.float16), r"weight is torch.float32 \(6, 4\)"),
    (to_wire, (TILE, CODE, torch.int8), "dtype is torch.int8"),
    (to_wire, (TILE, CODE.int(), torch.float16), "codes is torch.int32"),
    (to_wire, (TILE, ~CODE[:0], torch.float16), r"codes is torch.int16 \(0, 1\)"),
    (to_wire, (TILE, torch.full_like(CODE, -1), torch.float16), "codes has 1 tiles that .* first 0xffff"),
    (to_wire_, (TILE, torch.full_like(CODE, -1), HALF, NUMBER), "codes has 1 tiles"),
    (to_wire_, (TILE, CODE, HALF[:0], NUMBER[:0]), r"values is \(0, 2\): .* \(4, 4\) it must have at least 4 rows"),
    (to_wire_, (TILE, CODE, HALF, NUMBER.int()), r"numbers is torch.int32 \(1, 1\)"),
    (from_wire, (HALF[:3], NUMBER), r"the wire's values are torch.float32 \(3, 2\)"),
    (from_wire, (torch.zeros(2, 4).t(), NUMBER), r"values is torch.float32 \(4, 2\) on cpu: it must be contiguous"),
    (from_wire_, (HALF, NUMBER, TILE.half()), r"dense is torch.float16 \(4, 4\)"),
    (numbers_of_codes, (CODE.int(),), "codes is torch.int32"),
    (numbers_of_codes, (torch.zeros_like(CODE),), "codes has 1 tiles .* the first 0x0000"),
    (codes_of_numbers, (CODE,), "numbers is torch.int16"),
]


@pytest.mark.parametrize(("call", "arguments", "words"), BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    call: Callable[..., Any], arguments: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert not HALF.any()
