"""Tile codes by definition: bit ``4*row + column`` of a code is an entry of its tile."""

import torch
from torch import Tensor

BITS = tuple((row, column, 4 * row + column) for row in range(4) for column in range(4))
"""Row, column and bit of the entries of a tile."""


def pack_codes(mask: Tensor) -> Tensor:
    """Return the codes of a bool mask: ``[..., O, I]`` to int16 ``[..., O/4, I/4]``.

    Example:
        >>> pack_codes(torch.eye(4, dtype=torch.bool)).item() == -0x7BDF  # bits 0, 5, 10, 15
        True
    """
    entries = [mask[..., row::4, column::4].long() << bit for row, column, bit in BITS]
    return torch.stack(entries).sum(0).to(torch.int16)


def unpack_codes(codes: Tensor) -> Tensor:
    """Return the bool mask of int16 codes: ``[..., O/4, I/4]`` to ``[..., O, I]``.

    Example:
        >>> unpack_codes(torch.tensor([[0x0001]], dtype=torch.int16))[0].tolist()
        [True, False, False, False]
    """
    *batch, rows, columns = codes.shape
    mask = torch.zeros(*batch, 4 * rows, 4 * columns, dtype=torch.bool, device=codes.device)
    for row, column, bit in BITS:
        mask[..., row::4, column::4] = codes >> bit & 1 == 1
    return mask


def transpose_codes(codes: Tensor) -> Tensor:
    """Return the codes of the transposed mask: int16 ``[..., A, B]`` to ``[..., B, A]``.

    Example:
        >>> transpose_codes(torch.tensor([[0x000F]], dtype=torch.int16)).item() == 0x1111
        True
    """
    return pack_codes(unpack_codes(codes).mT)


def count_bits(codes: Tensor) -> Tensor:
    """Return the kept entries of every tile, int32, in the codes' shape.

    Example:
        >>> count_bits(torch.tensor([0, 5, -1], dtype=torch.int16)).tolist()
        [0, 2, 16]
    """
    return torch.stack([codes >> bit & 1 for _, _, bit in BITS]).sum(0, dtype=torch.int32)
