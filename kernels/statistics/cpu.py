"""Sums over what masks keep and prune, in chunks that fit a CPU's caches."""

import torch
from torch import Tensor

from ..tile_codes import count_bits, unpack_codes
from .reference import FIELDS

_TILES_PER_CHUNK = {"cpu": 1 << 16}


@torch.no_grad()
def measure(weight: Tensor, codes: Tensor, previous: Tensor | None = None) -> Tensor:
    """Return what :func:`.reference.measure` returns, without a mask in memory.

    Example:
        >>> codes = torch.full((1, 1), 0x000F, dtype=torch.int16)
        >>> measure(torch.ones(4, 4), codes, torch.zeros_like(codes)).tolist()
        [4.0, 12.0, 4.0, 16.0, 0.0, 4.0]
    """
    sums = torch.zeros(len(FIELDS), dtype=torch.float64, device=weight.device)
    sums[3] = weight.numel()
    if weight.numel() == 0:
        return sums
    step = max(1, _TILES_PER_CHUNK.get(weight.device.type, 1 << 22) // codes.shape[1])
    for top in range(0, codes.shape[0], step):
        part, kept_codes = weight[4 * top : 4 * (top + step)], codes[top : top + step]
        magnitude = part.abs()
        if magnitude.dtype in (torch.float16, torch.bfloat16):
            magnitude = magnitude.float()
        total = magnitude.sum(dtype=torch.float64)
        if part.device.type != "cpu" or not total.isfinite():
            finite = magnitude.isfinite()
            sums[4] += (~finite).sum()
            magnitude.masked_fill_(~finite, 0)
            total = magnitude.sum(dtype=torch.float64)
        kept = magnitude.mul_(unpack_codes(kept_codes)).sum(dtype=torch.float64)
        sums[0] += kept
        sums[1] += total - kept
        sums[2] += count_bits(kept_codes).sum()
        if previous is not None:
            sums[5] += count_bits(kept_codes ^ previous[top : top + step]).sum()
    return sums
