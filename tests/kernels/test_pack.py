"""Packing by the kernel and on a CPU against the definition, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.mask_search import search_transposable
from sparsetrain.kernels.metadata_order import Order
from sparsetrain.kernels.pack import Side, cpu, operator, reference
from sparsetrain.kernels.pack.reference import pack_rows
from sparsetrain.kernels.pack.triton_kernel import pack_into
from sparsetrain.kernels.pack.triton_unpack import unpack_into
from sparsetrain.kernels.tile_codes.reference import pack_codes, unpack_codes

SHAPES = [(4, 4), (12, 20), (132, 36), (20, 260)]
DTYPES = [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
]  # fmt: skip


def weights(kind: str, shape: tuple[int, int]) -> Tensor:
    if kind == "ties":
        return torch.randint(-2, 3, shape).float()
    values = torch.randn(shape)
    if kind == "nonfinite":
        for value in (float("nan"), float("inf"), -float("inf"), -0.0, 3e38, 1e-41):
            values[torch.rand(shape) < 0.05] = value
    return values


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit equality; NaN may have any payload, as a GPU's conversion has its own."""
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.view(integer).masked_fill(a.isnan(), 0), b.view(integer).masked_fill(b.isnan(), 0)
    )


def side(margins: Margins, rows: int, columns: int, dtype: torch.dtype) -> Side:
    """Targets of one matrix, in natural order."""
    values = margins.empty(rows, columns // 2, dtype=dtype)
    meta = margins.empty(rows, -(-columns // 16), dtype=torch.int16)
    return Side([values], [meta], [Order.NATURAL], [meta])


def sides(margins: Margins, weight: Tensor, dtype: torch.dtype) -> tuple[Side, Side]:
    rows, columns = weight.shape
    return side(margins, rows, columns, dtype), side(margins, columns, rows, dtype)


def parts_of(*packed: Side) -> list[Tensor]:
    return [part.cpu() for each in packed for part in (each.values[0], each.meta[0])]


def test_a_word_of_metadata_by_hand() -> None:
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[0, [0, 1, 4, 6, 9, 11, 14, 15, 16, 19]] = True
    values, meta = pack_rows(torch.arange(20.0)[None], mask)
    assert values.tolist() == [[0, 1, 4, 6, 9, 11, 14, 15, 16, 19]]
    assert [word & 0xFFFF for word in meta[0].tolist()] == [0xED84, 0x000C]  # 2,3 | 1,3 | 0,2 | 0,1, and 0,3
    assert torch.equal(reference.unpack_rows(values, meta), torch.arange(20.0)[None] * mask)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # 3e38 is infinite in float16
@pytest.mark.parametrize(("source", "target"), DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "ties", "nonfinite"])
def test_cpu_and_kernel_pack_what_the_reference_packs(
    kind: str, source: torch.dtype, target: torch.dtype, margins: Margins
) -> None:
    torch.manual_seed(0)
    for shape in SHAPES if kind == "gaussian" else SHAPES[:2]:
        weight = weights(kind, shape).to(source)
        codes = search_transposable(weight.abs())
        expected = reference.pack(weight, codes, target)
        found = cpu.pack(weight, codes, target)
        assert all(map(same_bits, found, expected)), shape
        on_device = margins.of(weight)
        for search in (True, False):
            packed = sides(margins, weight, target)
            given = margins.like(codes) if search else margins.of(codes)
            pack_into([on_device], [given], *packed, search)
            assert torch.equal(given.cpu(), codes), shape
            assert all(map(same_bits, parts_of(*packed), expected)), shape


def test_one_side_alone_packs_row_wise_masks(margins: Margins) -> None:
    weight = torch.randn(12, 84)
    kept = torch.rand(12, 21, 4).argsort(-1).argsort(-1) < 2
    mask = kept.view(12, 84)
    codes = pack_codes(mask)
    expected = pack_rows(weight, mask)
    assert all(map(same_bits, cpu.pack(weight, codes, torch.float32, transposed=False), expected))
    packed = side(margins, 12, 84, torch.float32)
    pack_into([margins.of(weight)], [margins.of(codes)], packed, None, search=False)
    assert all(map(same_bits, parts_of(packed), expected))


def test_the_transpose_needs_no_rows_that_keep_two(margins: Margins) -> None:
    weight = torch.randn(20, 84)
    kept = torch.rand(5, 4, 84).argsort(1).argsort(1) < 2
    mask = kept.view(20, 84)
    assert (mask.view(20, 21, 4).sum(2) != 2).any()
    codes = pack_codes(mask)
    expected = pack_rows(weight.t().bfloat16(), mask.t())
    assert all(map(same_bits, cpu.pack(weight, codes, torch.bfloat16)[2:], expected))
    packed = side(margins, 84, 20, torch.bfloat16)
    pack_into([margins.of(weight)], [margins.of(codes)], None, packed, search=False)
    assert all(map(same_bits, parts_of(packed), expected))
    alone = side(margins, 84, 20, torch.bfloat16)
    operator.pack_tiles_([margins.of(weight)], [margins.of(codes)], [], [], alone.values, alone.meta, [])
    assert all(map(same_bits, parts_of(alone), expected))


def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 52)
    codes = search_transposable(weight.abs())
    whole = cpu.pack(weight, codes, torch.bfloat16)
    monkeypatch.setitem(cpu.TILES_PER_CHUNK, "cpu", 1)
    assert all(map(torch.equal, cpu.pack(weight, codes, torch.bfloat16), whole))


def test_the_transpose_is_the_mask_of_the_weight_transposed_even_with_ties(margins: Margins) -> None:
    weight = margins.of(torch.randint(0, 2, (64, 132)).float())
    codes = margins.empty(16, 33, dtype=torch.int16)
    packed = sides(margins, weight, torch.float16)
    pack_into([weight], [codes], *packed, search=True)
    values, meta, values_t, meta_t = parts_of(*packed)
    ones = torch.ones_like
    kept, kept_t = reference.unpack_rows(ones(values), meta), reference.unpack_rows(ones(values_t), meta_t)
    assert torch.equal(kept, kept_t.t())
    assert torch.equal(kept.bool(), unpack_codes(codes.cpu()))


def test_unpacking_gives_the_masked_weight_back() -> None:
    weight = torch.randn(36, 84)
    codes, values, meta, values_t, meta_t = operator.search_and_pack(weight, torch.float32)
    assert torch.equal(reference.unpack_rows(values, meta), weight * unpack_codes(codes))
    assert torch.equal(reference.unpack_rows(values_t, meta_t).t(), weight * unpack_codes(codes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_unpacking_kernel_equals_the_reference(dtype: torch.dtype, kernel_device: str, margins: Margins) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape, device=kernel_device)
        _, *parts = operator.search_and_pack(weight, dtype)
        for values, meta in (parts[:2], parts[2:]):
            dense = margins.empty(values.shape[0], 2 * values.shape[1], dtype=dtype)
            unpack_into(values, meta, dense)
            assert same_bits(dense.cpu(), reference.unpack_rows(values.cpu(), meta.cpu())), shape
            assert torch.equal(operator.unpack_rows(values, meta), dense)
            torch.library.opcheck(operator.unpack_rows, (values, meta))


@pytest.mark.parametrize("start", [0, 1, 8])
def test_strided_views_are_read_in_place(start: int, margins: Margins) -> None:
    view = margins.of(torch.randn(28, start + 132), gap=17 - start)[:, start:]
    codes = margins.empty(7, 33, dtype=torch.int16)
    packed = sides(margins, view, torch.bfloat16)
    pack_into([view], [codes], *packed, search=True)
    expected = reference.pack(view.cpu(), search_transposable(view.cpu().abs()), torch.bfloat16)
    assert all(map(same_bits, parts_of(*packed), expected))


def test_weights_of_several_layouts_are_packed_in_one_call(margins: Margins) -> None:
    sources = [margins.of(torch.randn(shape)) for shape in ((8, 16), (12, 20), (8, 16))]
    codes = [margins.empty(w.shape[0] // 4, w.shape[1] // 4, dtype=torch.int16) for w in sources]
    each = [sides(margins, weight, torch.bfloat16) for weight in sources]
    both = []
    for place in (0, 1):
        values, meta = ([getattr(pair[place], name)[0] for pair in each] for name in ("values", "meta"))
        both.append(Side(values, meta, [Order.NATURAL] * 3, meta))
    pack_into(sources, codes, *both, search=True)
    for position, weight in enumerate(sources):
        expected = operator.search_and_pack(weight.cpu(), torch.bfloat16)
        found = [codes[position].cpu(), *parts_of(*each[position])]
        assert all(map(same_bits, found, expected))


def test_operators_pass_opcheck(kernel_device: str, margins: Margins) -> None:
    weight = torch.randn(12, 20, device=kernel_device)
    parts = operator.search_and_pack(weight, torch.bfloat16)
    columns = [[margins.like(part)] for part in parts]
    for call, arguments in (
        (operator.search_and_pack, (weight, torch.bfloat16)),
        (operator.search_and_pack, (weight.t(), torch.float32)),
        (operator.pack_tiles, (weight, parts[0], torch.float16)),
        (operator.search_and_pack_, ([weight], *columns, [])),
        (operator.pack_tiles_, ([weight], [parts[0]], *columns[1:], [])),
        (operator.pack_tiles_, ([weight], [parts[0]], *columns[1:3], [], [], [])),
    ):
        torch.library.opcheck(call, arguments)
    operator.search_and_pack_([weight], *columns, [])
    assert all(same_bits(found, want) for (found,), want in zip(columns, parts, strict=True))


CODES = torch.zeros(1, 1, dtype=torch.int16)
TILE = torch.zeros(4, 4)
BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (operator.search_and_pack, (torch.zeros(6, 4), torch.float16), r"weight is torch.float32 \(6, 4\)"),
    (operator.search_and_pack, (TILE.double(), torch.float16), "weight is torch.float64"),
    (operator.search_and_pack, (TILE, torch.int8), "dtype is torch.int8"),
    (operator.unpack_rows, (TILE, CODES), r"meta is torch.int16 \(1, 1\)"),
    (operator.unpack_rows, (TILE[:, :3], CODES), r"values is torch.float32 \(4, 3\)"),
    (operator.pack_tiles, (TILE, CODES.int(), torch.float16), "codes is torch.int32"),
    (operator.pack_tiles_, ([TILE], [CODES], [TILE[:, :2]], [], [], [], []), "have .1, 1, 1, 0, 0, 0. entries"),
    (
        operator.pack_tiles_,
        ([TILE], [CODES], [TILE[:, :2]], [TILE], [], [], []),
        r"values\[0\] is torch.float32 \(4, 2\)",
    ),
]


@pytest.mark.parametrize(("call", "arguments", "words"), BAD)
def test_bad_input_is_one_sentence(call: Callable[..., Any], arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
