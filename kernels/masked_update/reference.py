"""Masked decay and re-masking in plain torch, in place, without a mask in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dtypes import HALF_DTYPES
from ..mvue.reference import philox
from ..tile_codes import unpack_codes

SEED = int.from_bytes(b"decay", "little")
"""Key of the random numbers that round."""

_TILES_PER_CHUNK = {"cpu": 1 << 16}


@torch.no_grad()
def add_masked_decay_(
    gradient: Tensor, weight: Tensor, codes: Tensor, decay: float | Tensor, number: int = 0, clock: int = 0
) -> Tensor:
    """Add ``decay * (1 - mask) * weight`` to the gradient in place and return it.

    In 16 bits the sum is made in float32 and rounded to one of its two neighbours at random, so that its mean is right.

    Args:
        gradient: ``[O, I]``, changed in place.
        weight: ``[O, I]``, the master weight.
        codes: int16 ``[O/4, I/4]``.
        decay: λ, a number or a scalar tensor (which is not read on the host).
        number: Of the layer, with ``clock`` the counter of the random numbers.
        clock: Of the step.

    Example:
        >>> weight, codes = torch.ones(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)
        >>> add_masked_decay_(torch.zeros(4, 4), weight, codes, 0.5).sum(dim=1).tolist()
        [0.0, 2.0, 2.0, 2.0]
    """
    for rows, kept in _masks(codes):
        if gradient.dtype not in HALF_DTYPES:
            gradient[rows].add_(weight[rows].masked_fill(kept, 0).mul_(decay))
            continue
        total = gradient[rows].float() + weight[rows].float().masked_fill_(kept, 0).mul_(decay)
        gradient[rows] = round_at_random(total, gradient.dtype, _draws(codes, rows, number, clock))
    return gradient


def round_at_random(values: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Round float32 values to a neighbour in 16 bits: the one above with the probability that makes the mean right.

    What has 16 bits stays as it is, and so does what is not finite; beyond the largest number comes infinity.

    Args:
        values: float32.
        dtype: float16 or bfloat16.
        draws: int32 in [0, 2^16), like ``values``.

    Example:
        >>> values = torch.full((4,), 1 + 0.75 * 2**-7)  # three quarters of the way between two numbers
        >>> round_at_random(values, torch.bfloat16, torch.arange(4, dtype=torch.int32) << 14).float()
        tensor([1.0000, 1.0078, 1.0078, 1.0078])
    """
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = (bits + draws & ~0xFFFF).view(torch.float32)
    else:
        rounded = (bits + (draws >> 3) & ~0x1FFF).view(torch.float32)
        steps = values.abs() * 2.0**24  # of subnormal numbers, exact
        below = steps.floor()
        small = (below + ((steps - below) * 2.0**16 > draws)) * 2.0**-24
        rounded = torch.where(steps < 2.0**10, torch.copysign(small, values), rounded)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


@torch.no_grad()
def apply_mask_(tensor: Tensor, codes: Tensor) -> Tensor:
    """Write zeros into the pruned entries of ``tensor`` ``[O, I]`` in place and return it.

    Example:
        >>> apply_mask_(torch.ones(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)).sum().item()
        4.0
    """
    for rows, kept in _masks(codes):
        tensor[rows].masked_fill_(kept.logical_not_(), 0)
    return tensor


def _draws(codes: Tensor, rows: slice, number: int, clock: int) -> Tensor:
    """Return 16 random bits for every entry of some rows, int32: of a word of Philox each, four in a column at once."""
    columns, top = 4 * codes.shape[1], rows.start // 4
    count = min(rows.stop // 4, codes.shape[0]) - top
    place = torch.arange(top * columns, (top + count) * columns, device=codes.device)
    counter = [torch.full((), word & 0xFFFFFFFF, device=codes.device) for word in (number, clock, 0)]
    words = torch.stack([word.view(count, columns) for word in philox(SEED, place & 0xFFFFFFFF, *counter)], dim=1)
    return (words >> 16).to(torch.int32).view(4 * count, columns)


def _masks(codes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the mask in pieces of whole rows: bounded memory, and quick while it is in the caches."""
    step = max(1, _TILES_PER_CHUNK.get(codes.device.type, 1 << 22) // max(1, codes.shape[1]))
    for top in range(0, codes.shape[0], step):
        yield slice(4 * top, 4 * (top + step)), unpack_codes(codes[top : top + step])
