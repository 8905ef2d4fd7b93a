"""Masked decay and re-masking in plain torch."""

import torch
from torch import Tensor

from ..tile_codes.reference import unpack_codes


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
    return gradient.add_(weight.masked_fill(unpack_codes(codes), 0) * decay)


@torch.no_grad()
def apply_mask_(tensor: Tensor, codes: Tensor) -> Tensor:
    """Write zeros into the pruned entries of ``tensor`` ``[O, I]`` in place and return it.

    Example:
        >>> apply_mask_(torch.ones(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)).sum().item()
        4.0
    """
    return tensor.masked_fill_(~unpack_codes(codes), 0)
