"""Packing by definition: of every four entries of a row the two kept ones, and where they were."""

import torch
from torch import Tensor

from ..tile_codes.reference import unpack_codes

SHIFTS = (0, 4, 8, 12)
"""Bits at which the nibbles of four fours of columns begin in a word of metadata."""


@torch.no_grad()
def pack_rows(matrix: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack the kept entries of every row.

    Args:
        matrix: ``[R, C]``, C a multiple of 4.
        mask: bool ``[R, C]`` that keeps two of every four columns.

    Returns:
        ``values [R, C/2]`` in the matrix's dtype, and ``meta`` int16 ``[R, ceil(C/16)]``: a word holds a nibble
        ``i0 | i1 << 2`` for each of four fours of columns, from bit 0 up: the positions i0 < i1 that were kept. It is
        zero where no columns are left.

    Example:
        >>> values, meta = pack_rows(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[False, True, False, True]]))
        >>> values.tolist(), hex(meta.item())
        ([[2.0, 4.0]], '0xd')
    """
    rows, columns = matrix.shape
    positions = mask.reshape(rows, columns // 4, 4).nonzero()[:, 2].view(rows, columns // 4, 2)
    values = matrix.reshape(rows, columns // 4, 4).gather(2, positions).view(rows, columns // 2)
    nibbles = positions[..., 0] | positions[..., 1] << 2
    fours = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % 4)).view(rows, -(-columns // 16), 4)
    return values, (fours << torch.tensor(SHIFTS, device=mask.device)).sum(2).to(torch.int16)


def pack(weight: Tensor, codes: Tensor, dtype: torch.dtype, transposed: bool = True) -> list[Tensor]:
    """Pack a weight, and its transpose by the same mask.

    Args:
        weight: ``[O, I]``, floating point, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]`` with two kept entries in every row of a tile, and in every column if ``transposed``.
        dtype: Of the values, rounded to nearest even.
        transposed: Pack the transpose as well.

    Returns:
        ``values, meta`` of :func:`pack_rows`, and those of the transpose.

    Example:
        >>> weight, codes = torch.tensor([[1.0, 2, 3, 4]] * 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16)
        >>> values, meta = pack(weight, codes, torch.float32, transposed=False)
        >>> values.tolist()[:2], [hex(word) for word in meta.flatten().tolist()[:2]]
        ([[2.0, 4.0], [1.0, 3.0]], ['0xd', '0x8'])
    """
    rounded, mask = weight.to(dtype), unpack_codes(codes)
    return [*pack_rows(rounded, mask), *(pack_rows(rounded.t(), mask.t()) if transposed else ())]


@torch.no_grad()
def unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    """Return the dense ``[R, C]`` of packed rows; zero where nothing was kept.

    Args:
        values: ``[R, C/2]``.
        meta: int16 ``[R, ceil(C/16)]``, as :func:`pack_rows` returns it.

    Example:
        >>> unpack_rows(torch.tensor([[2.0, 4.0]]), torch.tensor([[0xD]], dtype=torch.int16)).tolist()
        [[0.0, 2.0, 0.0, 4.0]]
    """
    rows, groups = values.shape[0], values.shape[1] // 2
    shifts = torch.tensor(SHIFTS, device=meta.device)
    nibbles = (meta.long()[..., None] >> shifts & 0xF).flatten(1)[:, :groups]
    positions = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)  # [R, C/4, 2]
    dense = torch.zeros(rows, groups, 4, dtype=values.dtype, device=values.device)
    return dense.scatter_(2, positions, values.reshape(rows, groups, 2)).view(rows, groups * 4)
