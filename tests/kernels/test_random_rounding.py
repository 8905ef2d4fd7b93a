"""Masked decay of 16-bit gradients: summed in float32, rounded to a neighbour at random, so that the mean is right."""

import math

import numpy as np
import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.masked_update.operator import add_masked_decays_
from sparsetrain.kernels.masked_update.triton_kernel import decay_in_place
from sparsetrain.kernels.tile_codes.reference import pack_codes

DTYPES = [torch.bfloat16, torch.float16]
PRUNE_ALL = torch.zeros(1, 1, dtype=torch.int16)


def every_finite_number(dtype: torch.dtype) -> np.ndarray:
    """Sorted, in float64."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double().numpy()
    return np.unique(patterns[np.isfinite(patterns)])


def decayed(gradient: Tensor, weight: Tensor, decay: float, number: int = 0, clock: int = 0) -> Tensor:
    """The gradient with the decay of a mask that prunes everything."""
    changed = gradient.clone()
    codes = PRUNE_ALL.expand(gradient.shape[0] // 4, gradient.shape[1] // 4).contiguous()
    add_masked_decays_([changed], [weight], [codes], torch.tensor(decay), [number], clock)
    return changed


def sample(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of all sizes, subnormal ones among them, and weights."""
    gradient = torch.randn(16, 64) * 10.0 ** torch.randint(-9, 3, (16, 64))
    return gradient.to(dtype), torch.randn(16, 64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_become_one_of_their_two_neighbours(dtype: torch.dtype) -> None:
    gradient, weight = sample(dtype)
    found = decayed(gradient, weight, 1e-3).double().flatten().numpy()
    exact = (gradient.float() + weight.float() * 1e-3).double().flatten().numpy()
    numbers = every_finite_number(dtype)
    below = numbers[np.searchsorted(numbers, exact, side="right") - 1]
    above = numbers[np.searchsorted(numbers, exact, side="left")]
    assert ((found == below) | (found == above)).all()
    inexact = below != above
    assert 0.3 < (found == above)[inexact].mean() < 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_right_where_rounding_to_the_nearest_loses_all(dtype: torch.dtype) -> None:
    """Over n draws the mean of a rounded sum is within 5·(gap/2)/√n of it, as a draw is off by at most a gap."""
    gap = torch.finfo(dtype).eps  # between 1 and the next number
    gradient, weight = torch.ones(16, 64, dtype=dtype), torch.full((16, 64), 0.125 * gap, dtype=dtype)
    assert torch.equal((gradient.float() + weight.float()).to(dtype), gradient)  # lost
    steps = 40
    draws = torch.stack([decayed(gradient, weight, 1.0, clock=clock) for clock in range(steps)]).double()
    off = (draws.mean() - (1 + 0.125 * gap)).abs()
    assert off < 5 * gap / 2 / math.sqrt(draws.numel())
    assert set(draws.unique().tolist()) == {1.0, 1.0 + gap}
    tiny = torch.full((16, 64), float(torch.finfo(dtype).smallest_normal) / 4, dtype=dtype)  # subnormal
    step = float(torch.finfo(dtype).smallest_normal) * gap
    draws = torch.stack(
        [decayed(tiny, torch.ones_like(tiny), 0.25 * step, clock=clock) for clock in range(steps)]
    ).double()
    off = (draws.mean() - float(tiny[0, 0].double()) - 0.25 * step).abs()
    assert off < 5 * step / 2 / math.sqrt(draws.numel())


def test_draws_depend_on_layer_step_and_place_alone() -> None:
    ones = torch.ones(8, 64, dtype=torch.bfloat16)
    small = torch.full_like(ones, 2**-8)  # half a gap: up or down alike
    first = decayed(ones, small, 1.0, number=3, clock=5)
    assert torch.equal(first, decayed(ones, small, 1.0, number=3, clock=5))
    assert torch.equal(first[:4], decayed(ones[:4], small[:4], 1.0, number=3, clock=5))  # the same places
    for other in (decayed(ones, small, 1.0, 3, 6), decayed(ones, small, 1.0, 4, 5), first.flip(0), first.flip(1)):
        same = (first == other).double().mean()
        assert abs(same - 0.5) < 5 * 0.5 / math.sqrt(ones.numel())
    big = decayed(ones, small, 1.0, number=2**32 - 1, clock=2**33 + 5)
    assert torch.equal(big, decayed(ones, small, 1.0, number=2**32 - 1, clock=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_or_not_finite_stays_as_it_is(dtype: torch.dtype) -> None:
    gradient, weight = sample(dtype)
    gradient[0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")], dtype=dtype)
    mask = torch.rand(16, 64) < 0.5
    mask[0, :4] = torch.tensor([False, False, False, True])
    gradient[0, 3] = float("nan")
    changed = gradient.clone()
    add_masked_decays_([changed], [weight], [pack_codes(mask)], torch.tensor(1e-2), [1], 1)
    assert torch.equal(changed[mask].nan_to_num(7.0), gradient[mask].nan_to_num(7.0))
    assert torch.equal(changed[0, :2], gradient[0, :2])
    assert changed[0, 2:4].isnan().all()
    assert (changed != gradient)[~mask].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_equals_the_reference_bit_for_bit(dtype: torch.dtype, margins: Margins) -> None:
    torch.manual_seed(0)
    shapes = [(12, 20), (4, 1036), (12, 20)]
    gradients = [(torch.randn(shape) * 10.0 ** torch.randint(-9, 3, shape)).to(dtype) for shape in shapes]
    gradients[0][0, :3] = torch.tensor([float("inf"), -float("inf"), torch.finfo(dtype).max], dtype=dtype)
    gradients[1][0, 0] = float("nan")
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    codes = [torch.randint(-(2**15), 2**15, (rows // 4, columns // 4)).to(torch.int16) for rows, columns in shapes]
    numbers, clock = [5, 2**32 - 1, 6], 2**31 + 11
    on_device = [[margins.of(tensor, gap=12) for tensor in column] for column in (gradients, weights)]
    on_device.append([margins.of(code) for code in codes])
    decay_in_place(on_device[0], on_device[1], on_device[2], margins.of(torch.tensor([1e-3]))[0], numbers, clock)
    add_masked_decays_(gradients, weights, codes, torch.tensor(1e-3, dtype=torch.float64), numbers, clock)
    for by_kernel, by_reference in zip(on_device[0], gradients, strict=True):
        nan = by_reference.isnan()
        assert torch.equal(by_kernel.cpu().isnan(), nan)
        assert torch.equal(by_kernel.cpu().view(torch.int16)[~nan], by_reference.view(torch.int16)[~nan])
