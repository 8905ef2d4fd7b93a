"""Least squares for kept weights: against torch's own solver, row by row, and where there is nothing to solve."""

import pytest
import torch
from torch import Tensor

from sparsetrain.masks import least_squares, transposable_mask
from sparsetrain.masks.least_squares import gram, gram_shape, refitted


def correlated(tokens: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    return inputs @ torch.randn(features, features, generator=generator, dtype=torch.float64)


def error(inputs: Tensor, change: Tensor) -> float:
    return float((inputs @ change.double().T).square().sum())


@pytest.mark.parametrize("damping", [1e-7, 0.3])
@pytest.mark.parametrize("pattern", ["random", "transposable", "a full row and an empty one"])
def test_every_row_is_what_torch_finds(pattern: str, damping: float) -> None:
    inputs, weight = correlated(200, 24), torch.randn(8, 24)
    mask = transposable_mask(weight) if pattern == "transposable" else torch.rand(8, 24) > 0.4
    if pattern.startswith("a full"):
        mask[0], mask[1] = True, False
    found = refitted(weight, mask, gram(inputs), damping)
    assert torch.equal(found[~mask], weight[~mask])
    pulls = torch.diag(damping**0.5 * inputs.norm(dim=0))  # one more equation for every entry
    for row, (values, kept) in enumerate(zip(weight.double(), mask, strict=True)):
        wanted = torch.cat([inputs @ values, pulls[kept] @ values])
        solution = torch.linalg.lstsq(torch.cat([inputs[:, kept], pulls[kept][:, kept]]), wanted).solution
        torch.testing.assert_close(found[row, kept].double(), solution, rtol=0, atol=2e-3)


@pytest.mark.parametrize("columns", [24, 28, 64])
def test_blocks_are_solved_alone(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(least_squares, "WIDTH", 16)
    monkeypatch.setattr(least_squares, "CHUNK", 300)  # some rows at a time
    inputs, weight, mask = correlated(300, columns), torch.randn(12, columns), torch.rand(12, columns) > 0.5
    grams = gram(inputs)
    assert grams.shape == gram_shape(columns)
    width = grams.shape[2]
    assert 0 <= grams.shape[0] * width - columns < 4 * grams.shape[0]
    found = refitted(weight, mask, grams, 0.1)
    monkeypatch.setattr(least_squares, "WIDTH", 2048)
    for first in range(0, columns, width):
        part = slice(first, first + width)
        own = refitted(weight[:, part], mask[:, part], gram(inputs[:, part]), 0.1)
        torch.testing.assert_close(found[:, part], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("tokens", "share"), [(32, 0.5), (160, 0.1), (16, 1.0), (100_000, 0.01)])
def test_the_fewer_tokens_the_more_it_is_damped(tokens: int, share: float) -> None:
    inputs, weight, mask = correlated(tokens, 16), torch.randn(8, 16), torch.rand(8, 16) > 0.5
    found = gram(inputs.view(2, tokens // 2, 16))
    assert torch.equal(refitted(weight, mask, found), refitted(weight, mask, found, share))


def test_what_features_are_measured_in_makes_no_difference() -> None:
    inputs, weight, mask = correlated(50, 24), torch.randn(8, 24), torch.rand(8, 24) > 0.5
    units = torch.logspace(-2, 2, 24)
    wanted = refitted(weight, mask, gram(inputs))
    found = refitted(weight / units, mask, gram(inputs * units)) * units
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


def test_features_that_were_always_zero_stay() -> None:
    inputs, weight, mask = correlated(50, 24), torch.randn(8, 24), torch.rand(8, 24) > 0.5
    inputs[:, 5] = 0
    found = refitted(weight, mask, gram(inputs))
    assert torch.equal(found[:, 5], weight[:, 5])
    others = torch.arange(24) != 5
    wanted = refitted(weight[:, others], mask[:, others], gram(inputs[:, others]), 24 / 50)
    torch.testing.assert_close(found[:, others], wanted, rtol=0, atol=1e-4)


def test_outputs_come_closer_however_it_is_damped() -> None:
    inputs, weight = correlated(500, 64), torch.randn(16, 64)
    mask = transposable_mask(weight)
    errors = [error(inputs, weight - weight * mask)]
    errors += [error(inputs, weight - refitted(weight, mask, gram(inputs), by) * mask) for by in (10, 1, 0.1, 0.01)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_features_that_have_nothing_in_common_change_nothing() -> None:
    weight, mask = torch.randn(4, 8), torch.rand(4, 8) > 0.5
    torch.testing.assert_close(refitted(weight, mask, gram(torch.eye(8))), weight)


@pytest.mark.parametrize("inputs", [torch.zeros(3, 8), torch.full((3, 8), torch.inf)])
def test_inputs_that_say_nothing_change_nothing(inputs: Tensor) -> None:
    weight, mask = torch.randn(4, 8), torch.rand(4, 8) > 0.5
    assert torch.equal(refitted(weight, mask, gram(inputs)), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_products_are_summed_in_float32_under_autocast_too(dtype: torch.dtype) -> None:
    inputs = torch.randn(2, 50, 8).to(dtype)
    tokens = inputs.view(100, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram(inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, :8], tokens.T @ tokens)
    assert (found[0, 8] == 100).all()


def test_the_weights_dtype_stays() -> None:
    inputs, weight, mask = correlated(100, 8), torch.randn(4, 8).bfloat16(), torch.rand(4, 8) > 0.5
    found = refitted(weight, mask, gram(inputs))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, refitted(weight.float(), mask, gram(inputs)).bfloat16())
