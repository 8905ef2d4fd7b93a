"""Learned layouts against simulated vendors, whose order the tests made up and the code cannot know."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsetrain.kernels.layouts import LayoutError, LearnedLayout, cutlass_place, learn_layout, verify_layout

CPU = torch.device("cpu")
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
NATURAL_CODE = np.array([first | last << 2 for first, last in PAIRS], dtype=np.uint8)


def random_matrix(rows: int, columns: int, dtype: torch.dtype, rng: np.random.Generator) -> Tensor:
    """An exactly 2:4 matrix without zeros among the kept."""
    kept = np.array([[place in pair for place in range(4)] for pair in PAIRS])[rng.integers(0, 6, rows * columns // 4)]
    values = rng.uniform(0.5, 2, kept.shape) * rng.choice([-1, 1], kept.shape)
    return torch.from_numpy(np.where(kept, values, 0.0)).view(rows, columns).to(dtype)


def dissect(dense: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the kept values, and of every four which of ``PAIRS`` was kept."""
    fours = dense.view(torch.int16).numpy().reshape(-1, 4)
    kept = fours != 0
    assert (kept.sum(1) == 2).all(), "the vendor was given a matrix that is not exactly 2:4"
    number = np.zeros(16, dtype=np.int64)
    number[[1 << first | 1 << last for first, last in PAIRS]] = range(6)
    return fours[kept], number[kept @ np.array([1, 2, 4, 8])]


def words_of(nibbles: np.ndarray) -> np.ndarray:
    fours = nibbles.reshape(-1, 4).astype(np.uint16)
    return (fours[:, 0] | fours[:, 1] << 4 | fours[:, 2] << 8 | fours[:, 3] << 12).view(np.int16)


def natural_meta(dense: Tensor) -> Tensor:
    return torch.from_numpy(words_of(NATURAL_CODE[dissect(dense)[1]])).view(dense.shape[0], -1)


@dataclass
class Vendor:
    """A compressor: its unit number ``order[p]`` lies at place p, and padding where that is -1."""

    bits: int
    order: np.ndarray
    padding: str = "garbage"
    code: np.ndarray = field(default_factory=NATURAL_CODE.copy)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(99))
    constant: np.ndarray | None = None
    calls: int = 0

    def __call__(self, dense: Tensor) -> Tensor:
        self.calls += 1
        values, pairs = dissect(dense)
        groups = self.code[pairs].reshape(-1, self.bits // 4)
        tail = groups[self.order]
        tail[self.order < 0] = self.pad(int((self.order < 0).sum()), self.bits // 4)
        buffer = torch.from_numpy(np.concatenate([values, words_of(tail)])).view(dense.dtype)
        return buffer.view(dense.shape[0], -1) if buffer.numel() % dense.shape[0] == 0 else buffer

    def pad(self, *shape: int) -> np.ndarray:
        if self.padding == "valid":
            return self.rng.choice(NATURAL_CODE, shape)
        if self.padding == "constant" and self.constant is not None:
            return self.constant
        self.constant = self.rng.integers(0, 16, shape, dtype=np.uint8)
        return self.constant


def anywhere(bits: int, rows: int, columns: int, padded: int = 0, seed: int = 5) -> np.ndarray:
    """Units all over the matrix, and padding between them."""
    units = np.random.default_rng(seed).permutation(rows * columns // bits + padded)
    return np.where(units < rows * columns // bits, units, -1)


def in_tiles(bits: int, rows: int, columns: int, height: int = 32, words: int = 2) -> np.ndarray:
    """Tiles one column of tiles after the other, all in the same order inside."""
    width = words * 16 // bits
    numbers = np.arange(rows * columns // bits).reshape(rows // height, height, -1, width)
    inside = np.random.default_rng(7).permutation(height * width)
    return numbers.transpose(2, 0, 1, 3).reshape(-1, height * width)[:, inside].flatten()


def check_arrangement(layout: LearnedLayout, vendor: Vendor, dtype: torch.dtype) -> None:
    rows, columns = layout.rows, layout.columns
    dense = random_matrix(rows, columns, dtype, np.random.default_rng(11))
    buffer = vendor(dense).flatten().clone()
    expected = buffer[rows * columns // 2 :].view(torch.int16).clone()
    is_padding = np.repeat(vendor.order < 0, vendor.bits // 4)
    if vendor.padding != "constant":  # what changes from call to call is written as zero
        keep = torch.from_numpy(words_of(np.where(is_padding, 0, 15)))
        expected &= keep
    buffer[rows * columns // 2 :] = 1.5
    layout.arrange_(natural_meta(dense), buffer[rows * columns // 2 :])
    assert torch.equal(buffer[rows * columns // 2 :].view(torch.int16), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 96), (256, 384), (4, 16), (16, 48)])
def test_any_order_of_any_unit_is_learned(rows: int, columns: int, bits: int, dtype: torch.dtype) -> None:
    vendor = Vendor(bits, anywhere(bits, rows, columns))
    layout = learn_layout(vendor, rows, columns, dtype, CPU)
    assert (layout.rows, layout.columns, layout.unit_bits) == (rows, columns, bits)
    assert layout.source.dtype == torch.int32
    assert layout.source.tolist() == vendor.order.tolist()
    check_arrangement(layout, vendor, dtype)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_orders_in_tiles_are_learned(bits: int) -> None:
    vendor = Vendor(bits, in_tiles(bits, 256, 128))
    layout = learn_layout(vendor, 256, 128, torch.bfloat16, CPU)
    assert layout.unit_bits == bits
    assert layout.source.tolist() == vendor.order.tolist()
    check_arrangement(layout, vendor, torch.bfloat16)


@pytest.mark.parametrize("padding", ["garbage", "valid", "constant"])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("padded", [4, 3000])
def test_padding_is_recognised(padded: int, bits: int, padding: str) -> None:
    vendor = Vendor(bits, anywhere(bits, 128, 256, padded), padding)
    layout = learn_layout(vendor, 128, 256, torch.float16, CPU)
    assert layout.unit_bits == bits
    assert layout.source.tolist() == vendor.order.tolist()
    check_arrangement(layout, vendor, torch.float16)


@pytest.mark.parametrize("nibble", NATURAL_CODE.tolist())
def test_padding_that_looks_like_metadata_is_recognised(nibble: int) -> None:
    vendor = Vendor(16, anywhere(16, 64, 96, 40), "constant", constant=np.full((40, 4), nibble, dtype=np.uint8))
    layout = learn_layout(vendor, 64, 96, torch.float16, CPU)
    assert layout.source.tolist() == vendor.order.tolist()
    assert layout.padding.tolist() == [int(words_of(np.full(4, nibble))[0])] * 40


def test_more_garbage_than_metadata_is_weeded_out() -> None:
    rows, columns = 256, 384
    order = np.concatenate([anywhere(16, rows, columns), np.full(3 * rows * columns // 16, -1)])
    vendor = Vendor(16, order, "valid")
    assert learn_layout(vendor, rows, columns, torch.float16, CPU).source.tolist() == order.tolist()


@pytest.mark.parametrize(("bits", "before"), [(8, 1), (4, 1), (4, 3), (8, 3), (16, 5)])
def test_metadata_in_natural_order_may_start_inside_of_a_word(bits: int, before: int) -> None:
    natural, after = np.arange(64 * 96 // bits), -before % (16 // bits)
    vendor = Vendor(bits, np.concatenate([np.full(before, -1), natural, np.full(after, -1)]))
    layout = learn_layout(vendor, 64, 96, torch.float16, CPU)
    assert layout.unit_bits == bits
    assert layout.source.tolist() == vendor.order.tolist()
    check_arrangement(layout, vendor, torch.float16)


def test_a_vendor_may_reuse_its_buffer() -> None:
    vendor, buffers = Vendor(8, anywhere(8, 64, 96, 6), "constant"), list[Tensor]()

    def compress(dense: Tensor) -> Tensor:
        buffers.append(vendor(dense))
        return buffers[0].copy_(buffers.pop() if len(buffers) > 1 else buffers[0])

    assert learn_layout(compress, 64, 96, torch.float16, CPU).source.tolist() == vendor.order.tolist()


def test_a_large_matrix_is_learned_in_few_calls() -> None:
    vendor = Vendor(16, anywhere(16, 1024, 2048))
    layout = learn_layout(vendor, 1024, 2048, torch.bfloat16, CPU)
    assert layout.unit_bits == 16
    assert np.array_equal(layout.source.numpy(), vendor.order)
    assert vendor.calls <= 8 + 2 + 3  # 6^8 > 1024 · 2048 / 4 nibbles


def test_the_order_of_torchs_conversion_is_the_known_one() -> None:
    def compress(dense: Tensor) -> Tensor:
        return torch.cat(
            [part.flatten().view(dense.dtype) for part in sparse_semi_structured_from_dense_cutlass(dense)]
        )

    layout = learn_layout(compress, 96, 128, torch.float16, CPU)
    assert layout.unit_bits == 16
    for row, word in [(0, 0), (0, 1), (8, 0), (16, 3), (33, 2), (95, 7)]:
        assert layout.source[cutlass_place(row, word, 96)] == row * 8 + word


def test_the_random_numbers_of_the_training_are_left_alone() -> None:
    before = torch.get_rng_state()
    learn_layout(Vendor(16, anywhere(16, 64, 96)), 64, 96, torch.float16, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def edited(edit: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[Tensor], Tensor]:
    """A vendor in natural order whose values [R, C/2] and words are put together by ``edit``."""

    def compress(dense: Tensor) -> Tensor:
        values, pairs = dissect(dense)
        words = words_of(NATURAL_CODE[pairs])
        return torch.from_numpy(edit(values.reshape(dense.shape[0], -1).copy(), words.copy())).view(dense.dtype)

    return compress


def join(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    return np.concatenate([values.flatten(), words])


def swap_one_pair(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    values[37, [20, 21]] = values[37, [21, 20]]
    return join(values, words)


def lose_one_word(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    words[100] = words[7]
    return join(values, words)


def mirror_nibbles(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    first, last = words & 0x3333, words >> 2 & 0x3333
    return join(values, first << 2 | last)


def say_a_word_twice(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    return join(values, np.concatenate([words, words[:1]]))


def depend_on_the_values(values: np.ndarray, words: np.ndarray) -> np.ndarray:
    # no probe has such a value but random matrices of another seed
    return join(
        values, words if FIRST_VALUES.setdefault("bits", values[0].tobytes()) == values[0].tobytes() else ~words
    )


FIRST_VALUES: dict[str, bytes] = {}


class Growing:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, values: np.ndarray, words: np.ndarray) -> np.ndarray:
        self.calls += 1
        return join(values, np.concatenate([words, np.zeros(self.calls // 3, dtype=np.int16)]))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda values, words: np.concatenate([words, values.flatten()]), "other values at"),
        (lambda values, words: join(values.T, words), "other values at"),
        (lambda values, words: join(values[::-1], words), "other values at"),
        (swap_one_pair, "other values at 2 of the first 3072 places"),
        (mirror_nibbles, "of 1536 natural nibbles"),
        (lose_one_word, "shows 1532 of 1536 natural nibbles"),
        (lambda values, words: join(values, ~words), "of 1536 natural nibbles"),
        (lambda values, words: join(values, np.zeros_like(words)), "shows 0 of 1536 natural nibbles"),
        (say_a_word_twice, "shows 1536 of 1536 natural nibbles at 1540 places"),
        (lambda values, words: join(values, words[:-1]), "at least 3456 contiguous 16-bit elements"),
        (depend_on_the_values, "disagrees with the layout at 384 of 384 places"),
        (Growing(), "385 words behind the values, and 384 the first time"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(
    edit: Callable[[np.ndarray, np.ndarray], np.ndarray], words: str
) -> None:
    FIRST_VALUES.clear()
    with pytest.raises(LayoutError, match=words) as caught:
        learn_layout(edited(edit), 64, 96, torch.float16, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [[1, 2, 3, 4, 5, 0], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 5, 4]], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (108, 48)])  # 108 · 48 / 4 = 6^4: any digits are a number
def test_another_code_of_the_same_six_nibbles_is_refused(code: list[int], rows: int, columns: int) -> None:
    vendor = Vendor(16, anywhere(16, rows, columns), code=NATURAL_CODE[code])
    with pytest.raises(LayoutError, match=f"of {rows * columns // 4} natural nibbles"):
        learn_layout(vendor, rows, columns, torch.float16, CPU)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(6, 16, torch.float16), (16, 24, torch.float16), (16, 16, torch.float32)]
)
def test_what_has_no_natural_metadata_is_refused(rows: int, columns: int, dtype: torch.dtype) -> None:
    with pytest.raises(LayoutError, match=f"the matrix is {dtype} {rows} × {columns}: it must be"):
        learn_layout(lambda dense: dense, rows, columns, dtype, CPU)


def test_a_buffer_that_is_no_16_bit_memory_is_refused() -> None:
    for compress in (lambda dense: dense.float(), lambda dense: dense.t()):
        with pytest.raises(LayoutError, match="contiguous 16-bit elements"):
            learn_layout(compress, 64, 96, torch.float16, CPU)


def test_a_wrong_layout_does_not_pass_verification() -> None:
    vendor = Vendor(16, anywhere(16, 64, 96))
    layout = learn_layout(vendor, 64, 96, torch.float16, CPU)
    dense = random_matrix(64, 96, torch.float16, np.random.default_rng(3))
    values, meta = torch.from_numpy(dissect(dense)[0]).view(torch.float16).view(64, 48), natural_meta(dense)
    verify_layout(layout, vendor, dense, values, meta)
    vendor.order[[3, 200]] = vendor.order[[200, 3]]
    with pytest.raises(LayoutError, match="at 2 of 384 places"):
        verify_layout(layout, vendor, dense, values, meta)
    with pytest.raises(LayoutError, match="385 words behind the values: the layout has 384"):
        verify_layout(layout, Vendor(16, anywhere(16, 64, 96, 1)), dense, values, meta)


NONE = torch.empty(0, dtype=torch.int16)


@pytest.mark.parametrize(
    ("bits", "source", "padding", "words"),
    [
        (2, torch.zeros(2, dtype=torch.int32), NONE, "unit_bits is 2"),
        (16, torch.zeros(2), NONE, "source is torch.float32"),
        (16, torch.zeros(1, dtype=torch.int32), NONE, "at least 2 entries"),
        (16, torch.tensor([0, 2], dtype=torch.int32), NONE, "outside of -1 to 1"),
        (16, torch.tensor([0, -2], dtype=torch.int32), NONE, "outside of -1 to 1"),
        (16, torch.tensor([0, 1, -1], dtype=torch.int32), NONE, r"must be torch.int16 \(1,\)"),
        (8, torch.tensor([0, 1, 2, 3], dtype=torch.int32), NONE, r"must be torch.uint8 \(0,\)"),
    ],
)
def test_a_table_that_could_write_nonsense_is_refused(bits: int, source: Tensor, padding: Tensor, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        LearnedLayout(1, 32, bits, source, padding)


def test_arranging_into_the_wrong_memory_changes_nothing() -> None:
    layout = LearnedLayout(2, 32, 16, torch.tensor([3, 2, 1, 0], dtype=torch.int32), NONE)
    meta, tail = torch.arange(4, dtype=torch.int16).view(2, 2), torch.zeros(4, dtype=torch.bfloat16)
    for bad_meta, bad_tail, words in [
        (meta.int(), tail, "meta is torch.int32"),
        (meta.view(1, 4), tail, r"must be torch.int16 \(2, 2\)"),
        (meta, torch.zeros(5).half(), r"tail is torch.float16 \(5,\)"),
        (meta, torch.zeros(4), "tail is torch.float32"),
        (meta, torch.zeros(8).half()[::2], "must be the 4 contiguous"),
    ]:
        with pytest.raises(ValueError, match=words):
            layout.arrange_(bad_meta, bad_tail)
        assert not bad_tail.any()
    layout.arrange_(meta.t().contiguous().t(), tail)  # any strides
    assert tail.view(torch.int16).tolist() == [3, 2, 1, 0]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_arranging_never_waits_and_can_be_captured(bits: int, no_waiting: None) -> None:
    vendor = Vendor(bits, anywhere(bits, 128, 256, 64), "constant")

    def compress(dense: Tensor) -> Tensor:
        return vendor(dense.cpu()).cuda()

    layout = learn_layout(compress, 128, 256, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    dense = random_matrix(128, 256, torch.bfloat16, np.random.default_rng(11))
    meta, expected = natural_meta(dense).cuda(), vendor(dense).flatten()[128 * 128 :].view(torch.int16)
    source, tail = torch.zeros_like(meta), torch.full_like(expected, -1, device="cuda")
    layout.arrange_(source, tail)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    layout.arrange_(source, tail)
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layout.arrange_(source, tail)
    source.copy_(meta)
    graph.replay()
    assert torch.equal(tail.cpu(), expected)
