"""Masked decay and re-masking by the kernels and by the reference against plain masks."""

from collections.abc import Callable

import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.masked_update.operator import add_masked_decays_, apply_masks_
from sparsetrain.kernels.masked_update.reference import add_masked_decay_, apply_mask_
from sparsetrain.kernels.masked_update.triton_kernel import decay_in_place, mask_in_place
from sparsetrain.kernels.tile_codes.reference import pack_codes, unpack_codes

SHAPES = [(4, 4), (12, 20), (8, 1036), (4, 4)]


def random_codes(shape: tuple[int, int]) -> Tensor:
    return torch.randint(-(2**15), 2**15, (shape[0] // 4, shape[1] // 4)).to(torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_touches_pruned_entries_alone(dtype: torch.dtype) -> None:
    weight, gradient, mask = torch.randn(8, 12).to(dtype), torch.randn(8, 12).to(dtype), torch.rand(8, 12) < 0.5
    wanted = gradient + torch.where(mask, torch.zeros((), dtype=dtype), weight) * 0.3
    result = add_masked_decay_(gradient, weight, pack_codes(mask), 0.3)
    assert result is gradient
    assert torch.equal(gradient, wanted)


def test_applying_a_mask_removes_non_finite_values_too() -> None:
    tensor, mask = torch.full((4, 4), float("nan")), torch.eye(4, dtype=torch.bool)
    tensor[mask] = 2.0
    assert torch.equal(apply_mask_(tensor, pack_codes(mask)), 2 * torch.eye(4))


def test_the_decay_kernel_equals_the_reference_bit_for_bit(margins: Margins) -> None:
    torch.manual_seed(0)
    gradients, weights = [torch.randn(shape) for shape in SHAPES], [torch.randn(shape) for shape in SHAPES]
    codes = [random_codes(shape) for shape in SHAPES]
    wanted = [
        gradient + torch.where(unpack_codes(code), torch.zeros(()), weight) * 0.3
        for gradient, weight, code in zip(gradients, weights, codes, strict=True)
    ]
    on_device = [[margins.of(tensor) for tensor in column] for column in (gradients, weights, codes)]
    decay_in_place(on_device[0], on_device[1], on_device[2], margins.of(torch.tensor([0.3]))[0], [0] * len(SHAPES), 0)
    add_masked_decays_(gradients, weights, codes, torch.tensor(0.3, dtype=torch.float64))
    for by_kernel, by_reference, want in zip(on_device[0], gradients, wanted, strict=True):
        assert torch.equal(by_kernel.cpu(), want)
        assert torch.equal(by_reference, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_mask_kernel_equals_the_reference_bit_for_bit(dtype: torch.dtype, margins: Margins) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    tensors[1][0, 0] = float("nan")
    codes = [random_codes(shape) for shape in SHAPES]
    codes[1][0, 0] = 0x7FFE
    wanted = [
        torch.where(unpack_codes(code), tensor, torch.zeros((), dtype=dtype))
        for tensor, code in zip(tensors, codes, strict=True)
    ]
    on_device = [[margins.of(tensor) for tensor in column] for column in (tensors, codes)]
    mask_in_place(*on_device)
    apply_masks_(tensors, codes)
    for by_kernel, by_reference, want in zip(on_device[0], tensors, wanted, strict=True):
        assert torch.equal(by_kernel.cpu(), want)
        assert torch.equal(by_reference, want)


@pytest.mark.parametrize("start", [0, 3])
def test_neighbours_of_a_view_stay_as_they_were(start: int, kernel_device: str) -> None:
    storage = torch.randn(24, 150, device=kernel_device)
    before, view = storage.clone(), storage[2:14, start : start + 132]
    codes = random_codes((12, 132)).to(kernel_device)
    wanted = before.clone()
    wanted[2:14, start : start + 132] *= unpack_codes(codes)
    mask_in_place([view], [codes])
    assert torch.equal(storage, wanted)


def test_operators_pass_opcheck(kernel_device: str) -> None:
    tensors = [torch.randn(12, 20, device=kernel_device), torch.randn(20, 12, device=kernel_device).t()]
    codes = [random_codes((12, 20)).to(kernel_device) for _ in tensors]
    torch.library.opcheck(apply_masks_, (tensors, codes))
    decay = torch.tensor(0.5, dtype=torch.float64, device=kernel_device)
    torch.library.opcheck(add_masked_decays_, (tensors, [tensor + 1 for tensor in tensors], codes, decay))
    halves = [tensor.bfloat16() for tensor in tensors]
    torch.library.opcheck(add_masked_decays_, (halves, [tensor + 1 for tensor in halves], codes, decay, [3, 4], 5))
    mixed = [tensors[0], tensors[1], tensors[0].double()]
    before = [tensor.clone() for tensor in mixed]
    apply_masks_(mixed, [*codes, codes[0]])
    for tensor, old, code in zip(mixed, before, [*codes, codes[0]], strict=True):
        assert torch.equal(tensor, old.masked_fill(~unpack_codes(code), 0))


CODES = torch.zeros(1, 1, dtype=torch.int16)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tile: apply_masks_([tile], []), "tensors has 1 tensors but codes has 0"),
        (lambda tile: apply_masks_([tile, torch.zeros(4, 8)], [CODES, CODES]), r"tensors\[1\] is \(4, 8\)"),
        (lambda tile: apply_masks_([tile], [CODES.long()]), r"codes\[0\] is torch.int64"),
        (
            lambda tile: add_masked_decays_([tile], [torch.zeros(8, 4)], [CODES], torch.tensor(1.0)),
            r"weights\[0\] is \(8, 4\)",
        ),
        (
            lambda tile: add_masked_decays_([tile], [tile], [CODES], torch.tensor(1.0), [1, 2]),
            "numbers has 2 entries but codes has 1",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(call: Callable[[Tensor], object], words: str) -> None:
    tile = torch.ones(4, 4)
    with pytest.raises(ValueError, match=words) as caught:
        call(tile)
    assert "\n" not in str(caught.value)
    assert tile.min() == 1
