"""Masked decay and re-masking in plain torch, in place, without a mask in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tile_codes.reference import unpack_codes

_TILES_PER_CHUNK = {"cpu": 1 << 16}


@torch.no_grad()
def add_masked_decay_(gradient: Tensor, weight: Tensor, codes: Tensor, decay: float | Tensor) -> Tensor:
    """Add ``decay * (1 - mask) * weight`` to the gradient in place and return it.

    Args:
        gradient: ``[O, I]``, changed in place.
        weight: ``[O, I]``, the master weight.
        codes: int16 ``[O/4, I/4]``.
        decay: λ, a number or a scalar tensor (which is not read on the host).

    Example:
        >>> weight, codes = torch.ones(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)
        >>> add_masked_decay_(torch.zeros(4, 4), weight, codes, 0.5).sum(dim=1).tolist()
        [0.0, 2.0, 2.0, 2.0]
    """
    for rows, kept in _masks(codes):
        gradient[rows].add_(weight[rows].masked_fill(kept, 0).mul_(decay))
    return gradient


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


def _masks(codes: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the mask in pieces of whole rows: bounded memory, and quick while it is in the caches."""
    step = max(1, _TILES_PER_CHUNK.get(codes.device.type, 1 << 22) // max(1, codes.shape[1]))
    for top in range(0, codes.shape[0], step):
        yield slice(4 * top, 4 * (top + step)), unpack_codes(codes[top : top + step])
