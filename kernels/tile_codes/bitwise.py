"""Packing, unpacking, transposing and counting tile codes by integer arithmetic, on any device."""

import torch
from torch import Tensor

_SPREAD = 0x00204081  # multiplying a nibble by it puts bit b at bit 8b
_BYTES = 0x01010101
_TILES_PER_CHUNK = {"cpu": 1 << 16}  # whose rows stay in the caches


@torch.no_grad()
def pack_codes(mask: Tensor) -> Tensor:
    """Pack a bool mask ``[..., O, I]`` (O, I multiples of 4) into int16 tile codes ``[..., O/4, I/4]``.

    Example:
        >>> pack_codes(torch.eye(4, dtype=torch.bool)).item() == -0x7BDF  # bits 0, 5, 10, 15
        True
    """
    *batch, rows, columns = mask.shape
    tiles = mask.reshape(*batch, rows // 4, 4, columns // 4, 4)
    codes = torch.zeros(*batch, rows // 4, columns // 4, dtype=torch.int32, device=mask.device)
    for row in range(4):
        for column in range(4):
            codes |= tiles[..., row, :, column].to(torch.int32) << 4 * row + column
    return codes.to(torch.int16)


@torch.no_grad()
def unpack_codes(codes: Tensor) -> Tensor:
    """Unpack int16 tile codes ``[..., O/4, I/4]`` into a bool mask ``[..., O, I]``.

    Example:
        >>> unpack_codes(torch.tensor([[0x0001]], dtype=torch.int16))[0].tolist()
        [True, False, False, False]
    """
    *batch, tile_rows, tile_columns = codes.shape
    # tracing cannot follow views of another dtype, nor can inductor those of bools before torch 2.12
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        bits = torch.arange(16, dtype=torch.int32, device=codes.device).view(4, 1, 4)
        kept = (codes[..., None, :, None].to(torch.int32) >> bits & 1).bool()
        return kept.view(*batch, tile_rows * 4, tile_columns * 4)
    mask = torch.empty(*batch, tile_rows * 4, tile_columns * 4, dtype=torch.bool, device=codes.device)
    if mask.numel() == 0:
        return mask
    rows = mask.view(torch.int32).view(-1, 4, tile_columns)  # the four bytes of a tile's row
    tiles = codes.reshape(-1, 1, tile_columns)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=codes.device).view(4, 1)
    step = max(1, _TILES_PER_CHUNK.get(codes.device.type, 1 << 24) // tile_columns)
    for top in range(0, tiles.shape[0], step):
        part = rows[top : top + step]
        torch.bitwise_right_shift(tiles[top : top + step].to(torch.int32), shifts, out=part)
        part.bitwise_and_(0xF).mul_(_SPREAD).bitwise_and_(_BYTES)
    return mask


@torch.no_grad()
def transpose_codes(codes: Tensor) -> Tensor:
    """Return the tile codes of the transposed mask: int16 ``[..., A, B]`` to ``[..., B, A]``.

    Example:
        >>> transpose_codes(torch.tensor([[0x000F]], dtype=torch.int16)).item() == 0x1111
        True
    """
    bits = codes.to(torch.int32) & 0xFFFF
    for distance, lower in ((3, 0x0A0A), (6, 0x00CC)):
        moved = (bits ^ bits >> distance) & lower
        bits = bits ^ moved ^ moved << distance
    return bits.to(torch.int16).transpose(-1, -2).contiguous()


@torch.no_grad()
def count_bits(codes: Tensor) -> Tensor:
    """Count the set bits of every code; int16 in, int32 out, same shape.

    Example:
        >>> count_bits(torch.tensor([0, 5, -1], dtype=torch.int16)).tolist()
        [0, 2, 16]
    """
    bits = codes.to(torch.int32) & 0xFFFF
    bits = bits - (bits >> 1 & 0x5555)
    bits = (bits & 0x3333) + (bits >> 2 & 0x3333)
    bits = bits + (bits >> 4) & 0x0F0F
    return bits + (bits >> 8) & 0x1F
