"""Sums over what masks keep and prune, by definition: over plain masks, in float64."""

import torch
from torch import Tensor

from ..tile_codes.reference import unpack_codes

FIELDS = ("kept_sum", "pruned_sum", "kept_count", "total_count", "nonfinite_count", "flips")
"""The columns of the statistics; sums of ``|w|`` run over finite entries."""


@torch.no_grad()
def measure(weight: Tensor, codes: Tensor, previous: Tensor | None = None) -> Tensor:
    """Measure one weight and its mask.

    Args:
        weight: ``[O, I]``, any floating dtype and strides.
        codes: int16 ``[O/4, I/4]``.
        previous: Earlier codes, to count the mask entries that changed; None counts none.

    Returns:
        float64 ``[6]`` on the weight's device: the numbers of ``FIELDS``.

    Example:
        >>> codes = torch.full((1, 1), 0x000F, dtype=torch.int16)
        >>> measure(torch.ones(4, 4), codes, torch.zeros_like(codes)).tolist()
        [4.0, 12.0, 4.0, 16.0, 0.0, 4.0]
    """
    mask, finite = unpack_codes(codes), weight.isfinite()
    before = mask if previous is None else unpack_codes(previous)
    magnitude = weight.double().abs().where(finite, 0.0)
    kept, pruned = magnitude.where(mask, 0.0), magnitude.where(~mask, 0.0)
    counted = (kept, pruned, mask, torch.ones_like(mask), ~finite, mask != before)
    return torch.stack([entries.sum(dtype=torch.float64) for entries in counted])
