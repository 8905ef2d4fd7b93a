"""A wire by definition: the kept entries in order, and which of the sorted patterns every tile has."""

from functools import cache

import torch
from torch import Tensor

from ..tile_codes.reference import unpack_codes


@cache
def pattern_codes() -> list[int]:
    """Return the tile codes, without their sign, that keep two of every row and every column; ascending.

    Example:
        >>> len(pattern_codes()), hex(pattern_codes()[0])
        (90, '0x33cc')
    """
    tiles = unpack_codes(torch.arange(1 << 16)[:, None]).view(1 << 16, 4, 4)
    two = (tiles.sum(1) == 2).all(1) & (tiles.sum(2) == 2).all(1)
    found: list[int] = two.nonzero().flatten().tolist()
    return found


def to_wire(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the wire of a weight.

    Args:
        weight: ``[O, I]``, floating point, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]``, transposable 2:4.
        dtype: Of the values, rounded to nearest even.

    Returns:
        ``values [O, I/2]``, the kept entries of every row in order, and ``numbers`` uint8 ``[O/4, I/4]``, the place of
        every tile's code among :func:`pattern_codes`.

    Example:
        >>> tile = torch.arange(16.0).view(4, 4)
        >>> values, numbers = to_wire(tile, torch.full((1, 1), 0x5A5A, dtype=torch.int16), torch.float32)
        >>> values.tolist(), numbers.tolist()
        ([[1.0, 3.0], [4.0, 6.0], [9.0, 11.0], [12.0, 14.0]], [[23]])
    """
    values = weight.to(dtype)[unpack_codes(codes)].view(weight.shape[0], weight.shape[1] // 2)
    known = torch.tensor(pattern_codes())
    return values, ((codes.long() & 0xFFFF)[..., None] == known).long().argmax(-1).to(torch.uint8)


def from_wire(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the masked weight ``[O, I]`` of a wire; +0 where nothing was kept.

    Args:
        values: ``[O, I/2]``.
        numbers: uint8 ``[O/4, I/4]``.

    Example:
        >>> from_wire(torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.uint8)).tolist()[0]
        [0.0, 0.0, 1.0, 1.0]
    """
    mask = unpack_codes(torch.tensor(pattern_codes())[numbers.long()].to(torch.int16))
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask] = values.flatten()
    return dense
