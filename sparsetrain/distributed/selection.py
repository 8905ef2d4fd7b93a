"""The largest of numbers that are spread over processes: a threshold from histograms, sixteen bits at a time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIGIT = 16
"""Bits that one histogram tells apart."""


class Threshold(NamedTuple):
    """The smallest key that is chosen, and how many of the keys equal to it are."""

    key: int
    equal: int


def threshold_of_largest(keys: Tensor, count: int, add_up: Callable[[Tensor], Tensor]) -> Threshold:
    """Return the threshold of the ``count`` largest keys of all processes.

    Args:
        keys: int64, those of this process; none is possible.
        count: Of the keys that are chosen, at least 1 and at most all there are.
        add_up: Adds up int64 ``[65536]`` over the processes; called four times.

    Example:
        >>> threshold_of_largest(torch.tensor([5, -3, 7, 5, 5]), 3, lambda counts: counts)
        Threshold(key=5, equal=2)
    """
    key, left, alive = 0, count, torch.ones_like(keys, dtype=torch.bool)
    for shift in range(64 - DIGIT, -1, -DIGIT):
        digits = (keys >> shift) & ((1 << DIGIT) - 1)
        if shift == 64 - DIGIT:
            digits = digits ^ (1 << (DIGIT - 1))  # negative ones come first
        counts = add_up(torch.bincount(digits[alive], minlength=1 << DIGIT))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= left).sum()) - 1
        left -= int(at_least[digit] - counts[digit])
        alive &= digits == digit
        key = key << DIGIT | digit
    return Threshold(key - (1 << 63), left)


def ordered_keys(numbers: Tensor) -> Tensor:
    """Return int64 keys that are ordered as numbers are; equal ones have equal keys.

    Args:
        numbers: float64, none of them not a number.

    Example:
        >>> ordered_keys(torch.tensor([-1.0, -0.0, 0.0, 2.0], dtype=torch.float64)).diff().sign().tolist()
        [1, 0, 1]
    """
    bits = (numbers + 0.0).view(torch.int64)
    return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)
