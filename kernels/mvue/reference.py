"""Unbiased 2:4 estimates in plain torch, with Philox in int64; the derivation is in this folder's README."""

import torch
from torch import Tensor

from ..pack.reference import unpack_rows

ESTIMATORS = ("exact", "two_draw")
"""Minimum variance, and two draws without replacement."""

SECOND_STREAM = 1 << 31
"""Added to the micro-batch for the second uniform of ``two_draw``."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox-4x32-10 for a key and a counter.

    Args:
        seed: The key; its low 64 bits count.
        c0: int64, values in [0, 2^32); the four counter words broadcast.
        c1: The same.
        c2: The same.
        c3: The same.

    Returns:
        Four int64 tensors with values in [0, 2^32).

    Example:
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(word)) for word in philox(0, zero, zero, zero, zero)]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']

    Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # products wrap; their 64 bits are right
        c0, c1 = (odd >> 32 & _WORD) ^ c1 ^ k0, odd & _WORD
        c2, c3 = (even >> 32 & _WORD) ^ c3 ^ k1, even & _WORD
        k0, k1 = k0 + _KEY_STEPS[0] & _WORD, k1 + _KEY_STEPS[1] & _WORD
    return c0, c1, c2, c3


def uniforms(bits: Tensor) -> Tensor:
    """Return float32 in (0, 1), symmetric about one half, from the upper 23 of 32 bits.

    Example:
        >>> uniforms(torch.tensor([1 << 31])).item() - 0.5 == 2**-24
        True
    """
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23


def draw_exact(entries: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Keep two of every four entries, so that the estimate is unbiased and has the smallest variance there is.

    Args:
        entries: float32 ``[4, ...]``.
        uniform: float32 ``[...]`` in (0, 1).

    Returns:
        int64 positions ``[2, ...]``, the first smaller than the second, and their float32 values ``[2, ...]``.

    Example:
        >>> entries = torch.tensor([1.0, -5.0, 2.0, 0.0])
        >>> [part.tolist() for part in draw_exact(entries, torch.tensor(0.5))]
        [[1, 2], [-5.0, 3.0]]

    Source: this folder's README; the estimator's inclusion probabilities are those of Chmiel et al. 2022,
    arXiv 2203.10991.
    """
    a = entries.abs()
    low, high = torch.minimum(a[::2], a[1::2]), torch.maximum(a[::2], a[1::2])
    rest, largest = (low[0] + low[1]) + torch.minimum(high[0], high[1]), torch.maximum(high[0], high[1])
    scale = torch.minimum(rest, (rest + largest) * 0.5)
    limit = torch.where(rest == 0, largest, rest)
    # an infinity less itself would be NaN
    half = torch.where(rest == 0, largest, scale).clamp(max=torch.finfo(torch.float32).max)
    first, second, third = torch.minimum(a[:3], limit)
    second = first + second
    third = second + third
    start = uniform * half
    past_first, past_second = first < start, second < start
    # one half further, and behind the first whatever is rounded
    after_second = torch.minimum(second - half, first) < start
    after_third = torch.minimum(third - half, second) < start
    positions = torch.stack([past_first.long() + past_second, 1 + after_second.long() + after_third])
    kept = entries.gather(0, positions)
    return positions, torch.copysign(torch.maximum(kept.abs(), scale), kept)


def draw_two(entries: Tensor, first_uniform: Tensor, second_uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Keep two of every four entries by two draws without replacement, each proportional to the magnitudes left.

    Args:
        entries: float32 ``[4, ...]``.
        first_uniform: float32 ``[...]`` in (0, 1).
        second_uniform: The same.

    Returns:
        int64 positions ``[2, ...]``, the first smaller than the second, and their float32 values ``[2, ...]``.

    Example:
        >>> entries = torch.tensor([1.0, -5.0, 0.0, 0.0])
        >>> draw_two(entries, torch.tensor(0.5), torch.tensor(0.5))[0].tolist()
        [0, 1]

    Source: Chmiel et al. 2022, arXiv 2203.10991, the approximate 2:4 estimator.
    """
    a = entries.abs()
    one = _pick(a, first_uniform)
    index = torch.arange(4, device=a.device).view(4, *[1] * one.dim())
    two = _pick(torch.where(index == one, 0.0, a), second_uniform)
    two = torch.where(two == one, (one + 1) & 3, two)
    positions = torch.stack([torch.minimum(one, two), torch.maximum(one, two)])
    total = ((a[0] + a[1]) + a[2]) + a[3]
    odds = a / _others(a)
    scale = total / (_others(odds) + 1.0)
    kept = entries.gather(0, positions)
    # a product, so that a group with NaN has NaN where its zeros are kept
    return positions, torch.where(kept == 0, kept * total, torch.copysign(scale.gather(0, positions), kept))


@torch.no_grad()
def estimate(gradient: Tensor, counter: Tensor, seed: int, layer: int, estimator: str) -> tuple[Tensor, Tensor]:
    """Return ``values`` and ``meta`` of :func:`.operator.mvue`.

    Example:
        >>> values, meta = estimate(torch.randn(32, 3), torch.zeros(2, dtype=torch.int64), 0, 0, "exact")
        >>> values.shape, meta.shape
        (torch.Size([3, 16]), torch.Size([3, 2]))
    """
    tokens, features = gradient.shape
    words = -(-tokens // 16)
    entries = gradient.to(torch.float32).view(tokens // 4, 4, features).transpose(0, 1)  # [4, T/4, O]
    uniform = _stream(counter, seed, layer, words, features)[: tokens // 4]
    if estimator == "exact":
        positions, kept = draw_exact(entries, uniform)
    else:
        second = _stream(counter, seed, layer, words, features, SECOND_STREAM)[: tokens // 4]
        positions, kept = draw_two(entries, uniform, second)
    values = kept.to(gradient.dtype).permute(2, 1, 0).reshape(features, tokens // 2).contiguous()
    nibbles = torch.zeros(words * 4, features, dtype=torch.int64, device=gradient.device)
    nibbles[: tokens // 4] = positions[0] | positions[1] << 2
    shifts = torch.tensor([0, 4, 8, 12], device=gradient.device)[:, None]
    meta = (nibbles.view(words, 4, features) << shifts).sum(1).t()
    return values, meta.to(torch.int16).contiguous()


def dense_estimate(values: Tensor, meta: Tensor) -> Tensor:
    """Return the estimate ``[T, O]`` of packed ``values [O, T/2]`` and ``meta [O, ceil(T/16)]``.

    Example:
        >>> dense_estimate(torch.tensor([[2.0, 4.0]]), torch.tensor([[0xD]], dtype=torch.int16)).flatten().tolist()
        [0.0, 2.0, 0.0, 4.0]
    """
    return unpack_rows(values, meta).t()


def _stream(counter: Tensor, seed: int, layer: int, words: int, features: int, offset: int = 0) -> Tensor:
    """Return a float32 uniform for every four tokens of every feature, ``[4·words, O]``."""
    place = torch.arange(words * features, device=counter.device).view(words, features)
    of_layer = torch.full((), layer, dtype=torch.int64, device=counter.device)
    drawn = philox(seed, place, of_layer, counter[0] & _WORD, (counter[1] & SECOND_STREAM - 1) + offset)
    return uniforms(torch.stack(drawn, 1)).view(words * 4, features)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the position of four, drawn in proportion to the weights."""
    first, second = weights[0], weights[0] + weights[1]
    third = second + weights[2]
    point = uniform * (third + weights[3])
    return (first < point).long() + (second < point) + (third < point)


def _others(x: Tensor) -> Tensor:
    """Return for each of four the sum of the other three, without a difference."""
    pair, last_pair = x[0] + x[1], x[2] + x[3]
    return torch.stack([x[1] + last_pair, x[0] + last_pair, x[3] + pair, x[2] + pair])
