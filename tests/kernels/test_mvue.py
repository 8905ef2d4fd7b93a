"""Unbiased estimates: drawn bits, packing, and statistics with stated confidence."""

import pytest
import torch
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.mvue import ESTIMATORS as METHODS
from sparsetrain.kernels.mvue import dense_estimate, mvue, philox
from sparsetrain.kernels.mvue.triton_kernel import estimate_into

SHAPES = [(4, 3), (20, 7), (16, 64), (148, 70)]
SIGMAS = 5.5  # two-sided 4e-8 for one normal number: below 1e-4 for all that a test here compares


def test_philox_gives_the_published_words() -> None:
    def words(seed: int, *counter: int) -> list[str]:
        return [f"{int(word):08x}" for word in philox(seed, *map(torch.tensor, counter))]

    assert words(0, 0, 0, 0, 0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = 0xFFFFFFFF
    assert words((1 << 64) - 1, ones, ones, ones, ones) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(0x299F31D0A4093822, *pi) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def gradients(kind: str, shape: tuple[int, int]) -> Tensor:
    values = torch.randn(shape)
    if kind == "heavy":
        return values**3
    if kind == "zeros":
        return values * (torch.rand(shape) < 0.3)
    if kind == "ties":
        return torch.randint(-1, 2, shape).float()
    if kind == "nonfinite":
        values[torch.rand(shape) < 0.1] = float("nan")
        values[torch.rand(shape) < 0.1] = float("inf")
    return values


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "zeros", "ties", "nonfinite"])
@pytest.mark.parametrize("method", METHODS)
def test_kernel_and_reference_draw_the_same(method: str, kind: str, dtype: torch.dtype, margins: Margins) -> None:
    for shape in SHAPES if kind == "gaussian" else SHAPES[1:2]:
        gradient = gradients(kind, shape).to(dtype)
        seed, layer, counter = 2**40 + 12345, 7, torch.tensor([2**32 - 1, 3])
        wanted_values, wanted_meta = mvue(gradient, counter, seed, layer, method)
        values, meta = margins.like(wanted_values), margins.like(wanted_meta)
        estimate_into(margins.of(gradient), margins.of(counter), seed, layer, method, values, meta)
        assert torch.equal(meta.cpu(), wanted_meta), shape
        torch.testing.assert_close(values.cpu(), wanted_values, rtol=0, atol=0, equal_nan=True)


def draw(
    gradient: Tensor, seed: int = 0, layer: int = 0, clock: int = 0, micro_batch: int = 0, method: str = "exact"
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = mvue(gradient, torch.tensor([clock, micro_batch]), seed, layer, method)
    return found


def dense(gradient: Tensor, method: str) -> Tensor:
    """An estimate of ``[T, O]``, unpacked."""
    return dense_estimate(*draw(gradient, method=method))


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "zeros", "ties"])
@pytest.mark.parametrize("method", METHODS)
def test_the_mean_is_the_gradient(kind: str, method: str) -> None:
    draws = 40_000
    group = gradients(kind, (16, 8))
    samples = dense(group.repeat(1, draws), method).view(16, draws, 8).double()
    mean, error = samples.mean(1), samples.std(1) / draws**0.5
    # an entry's probability is at least its share of the group; a mean of fewer than 200 hits is not nearly normal
    share = group.abs() / group.view(4, 4, 8).abs().sum(1).repeat_interleave(4, 0)
    often = (group == 0) | (share * draws > 200)
    assert often.float().mean() > 0.8
    # the same for misses of an entry that is nearly always kept: 300 of them move the mean by less than this
    seldom = 300 / draws * group.abs()
    assert ((mean - group).abs() <= SIGMAS * error + seldom)[often].all()
    assert (samples.unflatten(0, (4, 4)).ne(0).sum(1) <= 2).all()


def least_variance(group: Tensor) -> Tensor:
    """Of ``[4, n]``, summed over the group, by the formulas of the README."""
    m = group.double().abs()
    total, largest = m.sum(0), m.max(0).values
    balanced = total**2 / 2 - (m**2).sum(0)
    return torch.where(largest > total / 2, (total - largest) ** 2 - (m**2).sum(0) + largest**2, balanced)


def test_the_exact_draw_has_the_least_variance_and_two_draws_have_more() -> None:
    draws = 40_000
    groups = torch.cat([gradients("gaussian", (4, 12)), gradients("heavy", (4, 12))], dim=1)
    squares = {}
    for method in METHODS:
        samples = dense(groups.repeat(1, draws), method).view(4, draws, 24).double()
        squares[method] = ((samples - groups[:, None]) ** 2).sum(0)
    mean, error = squares["exact"].mean(0), squares["exact"].std(0) / draws**0.5
    least = least_variance(groups)
    assert ((mean - least).abs() <= SIGMAS * error + 1e-5 * least).all()
    assert squares["two_draw"].mean(0).sum() > 1.01 * least.sum()


def test_draws_are_a_function_of_their_key_alone() -> None:
    gradient = torch.randn(64, 32)
    base = draw(gradient, 1, 2, 3, 4)
    assert all(map(torch.equal, base, draw(gradient.clone(), 1, 2, 3, 4)))
    for key in ((2, 2, 3, 4), (1 + (1 << 32), 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)):
        assert not torch.equal(base[1], draw(gradient, *key)[1]), key


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_groups_are_noticed_and_stay_valid(method: str) -> None:
    gradient = torch.zeros(16, 4)
    gradient[1, 0], gradient[6, 1], gradient[11, 2] = float("nan"), float("inf"), -float("inf")
    values, meta = draw(gradient, method=method)
    assert (~values.isfinite()).any(1).tolist() == [True, True, True, False]
    nibbles = meta.int()[..., None] >> torch.tensor([0, 4, 8, 12]) & 15
    assert ((nibbles & 3) < (nibbles >> 2)).all()


def test_a_lone_entry_is_kept_as_it_is() -> None:
    gradient = torch.zeros(32, 16, dtype=torch.bfloat16)
    gradient[torch.arange(0, 32, 4) + torch.arange(8) % 4] = torch.randn(8, 16).bfloat16()
    for method in METHODS:
        assert torch.equal(dense(gradient, method), gradient)


def test_strided_rows_and_opcheck(margins: Margins) -> None:
    view = margins.of(torch.randn(20, 30), gap=10)[:, 3:]
    values, meta = margins.empty(27, 10), margins.empty(27, 2, dtype=torch.int16)
    counter = margins.of(torch.tensor([2, 3]))
    estimate_into(view, counter, 0, 1, "exact", values, meta)
    assert all(map(torch.equal, (values.cpu(), meta.cpu()), draw(view.cpu().contiguous(), 0, 1, 2, 3)))
    for method in METHODS:
        torch.library.opcheck(mvue, (view, counter, 0, 1, method))
    assert mvue(view[:0], counter, 0, 0)[0].shape == (27, 0)


@pytest.mark.parametrize(
    ("gradient", "layer", "method", "words"),
    [
        (torch.zeros(6, 4), 0, "exact", r"gradient is torch.float32 \(6, 4\)"),
        (torch.zeros(8, 4).double(), 0, "exact", "gradient is torch.float64"),
        (torch.zeros(8, 4), 0, "best", "estimator is 'best'"),
        (torch.zeros(8, 4), -1, "exact", "layer is -1"),
    ],
)
def test_bad_input_is_one_sentence(gradient: Tensor, layer: int, method: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        draw(gradient, 0, layer, method=method)
    assert "\n" not in str(caught.value)
