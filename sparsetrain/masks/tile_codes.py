"""Tile codes: masks of weights ``[O, I]`` stored as one int16 per 4×4 tile, bit ``4*row + col`` set where kept."""

import torch
from torch import Tensor

from ..checks.tensors import require_dtype
from ..kernels.tile_codes import count_bits, pack_codes, transpose_codes, unpack_codes

KEEP_ALL = -1
"""The code of a tile that keeps all 16 entries."""


def encode_tiles(mask: Tensor) -> Tensor:
    """Encode a mask as tile codes.

    Args:
        mask: bool ``[..., O, I]``; O and I multiples of 4.

    Returns:
        int16 ``[..., O/4, I/4]``.

    Raises:
        TypeError: If the mask is not bool.
        ValueError: If O or I is not a multiple of 4.

    Example:
        >>> encode_tiles(torch.ones(4, 8, dtype=torch.bool)).tolist()
        [[-1, -1]]
    """
    require_dtype("mask", mask, torch.bool)
    require_tiles("mask", mask.shape)
    return pack_codes(mask)


def decode_tiles(codes: Tensor) -> Tensor:
    """Decode tile codes into a mask.

    Args:
        codes: int16 ``[..., O/4, I/4]``.

    Returns:
        bool ``[..., O, I]``.

    Raises:
        TypeError: If the codes are not int16.
        ValueError: If the codes have fewer than two dimensions.

    Example:
        >>> decode_tiles(torch.tensor([[-1]], dtype=torch.int16)).all().item()
        True
    """
    _require_codes("codes", codes)
    return unpack_codes(codes)


def transpose_tiles(codes: Tensor) -> Tensor:
    """Return the tile codes of the transposed mask.

    Args:
        codes: int16 ``[..., O/4, I/4]``.

    Returns:
        int16 ``[..., I/4, O/4]``.

    Raises:
        TypeError: If the codes are not int16.
        ValueError: If the codes have fewer than two dimensions.

    Example:
        >>> mask = torch.rand(8, 4) < 0.5
        >>> torch.equal(decode_tiles(transpose_tiles(encode_tiles(mask))), mask.T)
        True
    """
    _require_codes("codes", codes)
    return transpose_codes(codes)


def count_flips(old_codes: Tensor, new_codes: Tensor) -> Tensor:
    """Count the mask entries in which two sets of tile codes differ, without waiting for the device.

    Args:
        old_codes: int16 ``[..., O/4, I/4]``.
        new_codes: int16, same shape and device.

    Returns:
        int64 scalar tensor: changed entries. Divide by ``16 * codes.numel()`` for the flip rate.

    Raises:
        TypeError: If either is not int16.
        ValueError: If the shapes or devices differ.

    Example:
        >>> count_flips(torch.tensor([[3]], dtype=torch.int16), torch.tensor([[5]], dtype=torch.int16)).item()
        2
    """
    _require_codes("old_codes", old_codes)
    _require_codes("new_codes", new_codes)
    if old_codes.device != new_codes.device:
        raise ValueError(f"new_codes is on {new_codes.device} but old_codes on {old_codes.device}: move one of them.")
    if old_codes.shape != new_codes.shape:
        raise ValueError(
            f"new_codes has shape {tuple(new_codes.shape)} but old_codes has {tuple(old_codes.shape)}: "
            "flips are counted between two masks of the same weight."
        )
    return count_bits(old_codes ^ new_codes).sum()


def require_tiles(name: str, shape: torch.Size | tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless the last two dimensions of ``shape`` are multiples of 4."""
    if len(shape) < 2 or shape[-2] % 4 or shape[-1] % 4:
        raise ValueError(
            f"{name} has shape {tuple(shape)}: the last two dimensions must be multiples of 4, "
            "so pad them or leave this layer dense."
        )


def _require_codes(name: str, codes: Tensor) -> None:
    require_dtype(name, codes, torch.int16)
    if codes.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(codes.shape)}: tile codes are [..., O/4, I/4], so pass a matrix.")
