"""The Triton search against the definition and the CPU's search, bit for bit, on a GPU or in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.mask_search import reference, search_transposable, triton_kernel
from sparsetrain.kernels.mask_search.operator import search_tiles, search_tiles_, search_tiles_with_mask
from sparsetrain.kernels.mask_search.triton_kernel import search_into, search_kernel
from sparsetrain.kernels.tile_codes.reference import unpack_codes

SHAPES = [(4, 4), (12, 20), (8, 1032)]  # one tile; less than a block; more than one block of columns


def nonfinite(*shape: int) -> Tensor:
    values = torch.randn(shape)
    for value in (float("nan"), float("inf"), -float("inf"), 2.0**101, -0.0, 1e-44):
        values[torch.rand(shape) < 0.06] = value
    return values


SCORES: dict[str, Callable[..., Tensor]] = {
    "gaussian": torch.randn,
    "uniform": torch.rand,
    "heavy tails": lambda *shape: torch.randn(shape) ** 9,
    "ties": lambda *shape: torch.randint(-2, 3, shape).float(),
    "zeros": torch.zeros,
    "negative": lambda *shape: -torch.rand(shape) - 1,
    "nonfinite": nonfinite,
}
EXACT = ("ties", "zeros")  # sums that no rounding changes


def launch(scores: Tensor, margins: Margins, magnitude: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and mask of the kernel."""
    rows, columns = scores.shape
    codes = margins.empty(rows // 4, columns // 4, dtype=torch.int16)
    mask = margins.empty(rows, columns, dtype=torch.uint8)
    search_into([scores], [codes], magnitude, [mask.view(torch.bool)])
    alone = margins.like(codes)
    search_into([scores], [alone], magnitude)
    assert torch.equal(codes, alone)
    assert int(mask.max()) <= 1
    return codes.cpu(), mask.bool().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("magnitude", [False, True])
def test_kernel_reference_and_cpu_agree_bit_for_bit(
    kind: str, dtype: torch.dtype, magnitude: bool, margins: Margins
) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        scores = SCORES[kind](*shape).to(dtype)
        expected = search_transposable(scores.abs() if magnitude else scores)
        codes, mask = launch(margins.of(scores), margins, magnitude)
        assert torch.equal(codes, expected), shape
        if kind in EXACT:
            assert torch.equal(codes, reference.search_transposable(scores, magnitude)), shape
        assert torch.equal(mask, unpack_codes(expected)), shape


def test_many_blocks_of_rows_are_searched(margins: Margins) -> None:
    scores = torch.randn(1028, 36)
    assert torch.equal(launch(margins.of(scores), margins)[0], search_transposable(scores))


def test_the_kernel_is_optimal_over_the_90_patterns(margins: Margins) -> None:
    torch.manual_seed(1)
    scores = torch.randint(-50, 50, (16, 1024)).float()
    codes, _ = launch(margins.of(scores), margins)
    assert torch.equal(codes, reference.search_transposable(scores))


@pytest.mark.parametrize("start", [0, 1, 4])
def test_strided_and_unaligned_views_are_read_in_place(start: int, margins: Margins) -> None:
    storage = margins.of(torch.randn(40, start + 64), gap=36 - start)
    view = storage[2:38:1, start:]
    expected = search_transposable(view.cpu())
    assert torch.equal(launch(view, margins)[0], expected)
    every_second = storage[::2, start:]
    assert torch.equal(launch(every_second, margins)[0], search_transposable(every_second.cpu()))


def test_tensors_of_several_layouts_are_searched_in_one_call(kernel_device: str, margins: Margins) -> None:
    shapes = [(8, 16), (12, 20), (8, 16), (4, 4), (8, 16)]
    scores = [torch.randn(shape, device=kernel_device) for shape in shapes] + [
        torch.randn(8, 16, device=kernel_device).bfloat16()
    ]
    codes = [margins.empty(s.shape[0] // 4, s.shape[1] // 4, dtype=torch.int16) for s in scores]
    search_into(scores, codes, magnitude=True)
    for source, target in zip(scores, codes, strict=True):
        assert torch.equal(target.cpu(), search_transposable(source.cpu().abs()))


def test_a_model_of_few_layouts_takes_few_launches(
    kernel_device: str, margins: Margins, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids = []

    class Counted:
        def __getitem__(self, grid: tuple[int, int]) -> Any:
            grids.append(grid)
            return search_kernel[grid]

    monkeypatch.setattr(triton_kernel, "search_kernel", Counted())
    shapes = [(16, 32), (16, 32), (32, 16)] * 6
    weights = [torch.randn(shape, device=kernel_device) for shape in shapes]
    codes = [margins.empty(w.shape[0] // 4, w.shape[1] // 4, dtype=torch.int16) for w in weights]
    search_into(weights, codes, magnitude=True)
    assert [grid[1] for grid in grids] == [12, 6]
    assert all(torch.equal(c.cpu(), search_transposable(w.cpu(), True)) for w, c in zip(weights, codes, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck_and_equal_the_reference(
    dtype: torch.dtype, kernel_device: str, margins: Margins
) -> None:
    scores = torch.randn(12, 20, device=kernel_device).to(dtype)
    codes = margins.empty(3, 5, dtype=torch.int16)
    for operator, arguments in (
        (search_tiles, (scores, True)),
        (search_tiles, (scores.t(), False)),
        (search_tiles_with_mask, (scores, True)),
        (search_tiles_, ([scores, scores + 1], [codes, codes.clone()], True)),
    ):
        torch.library.opcheck(operator, arguments)
    expected = search_transposable(scores.cpu().abs())
    assert torch.equal(search_tiles(scores, True).cpu(), expected)
    found, mask = search_tiles_with_mask(scores, True)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(mask.cpu(), unpack_codes(expected))
    search_tiles_([scores], [codes], True)
    assert torch.equal(codes.cpu(), expected)
    assert search_tiles(torch.empty(0, 8, device=kernel_device)).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: search_tiles(torch.zeros(6, 8)), r"scores is torch.float32 \(6, 8\)"),
        (lambda: search_tiles(torch.zeros(8, 8, dtype=torch.int32)), "scores is torch.int32"),
        (lambda: search_tiles_([torch.zeros(4, 4)], []), "codes has 0 tensors but scores has 1"),
        (lambda: search_tiles_([torch.zeros(4, 4)], [torch.zeros(1, 2, dtype=torch.int16)]), r"codes\[0\] is"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
