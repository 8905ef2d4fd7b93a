"""Packing by tile codes in plain torch: kept values and where they were, in natural order and in others."""

from functools import lru_cache

import torch
from torch import Tensor

from ..metadata_order import Order, metadata_places

_TILES_PER_CHUNK = {"cpu": 1 << 17}  # whose planes stay in the caches
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def pack(weight: Tensor, codes: Tensor, dtype: torch.dtype, transposed: bool = True) -> list[Tensor]:
    """Pack the kept entries of every row of a weight, and of its transpose by the same mask.

    Args:
        weight: ``[O, I]``, floating point, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]`` with two kept entries in every row of a tile, and in every column if ``transposed``.
        dtype: Of the values.
        transposed: Pack the transpose as well.

    Returns:
        ``values [O, I/2]``, ``meta`` int16 ``[O, ceil(I/16)]``; then ``[I, O/2]`` and ``[I, ceil(O/16)]`` of the
        transpose. A word of ``meta`` holds a nibble ``i0 | i1 << 2`` for each of four fours of columns, from bit 0 up:
        the positions i0 < i1 that were kept. It is zero where no columns are left.

    Example:
        >>> weight, codes = torch.tensor([[1.0, 2, 3, 4]] * 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16)
        >>> values, meta = pack(weight, codes, torch.float32, transposed=False)
        >>> values.tolist()[:2], [hex(word) for word in meta.flatten().tolist()[:2]]
        ([[2.0, 4.0], [1.0, 3.0]], ['0xd', '0x8'])
    """
    tile_rows, tile_columns = codes.shape
    packed = empty_packed(weight, dtype, transposed)
    if weight.numel() == 0:
        return packed
    bits = _INTEGERS[dtype.itemsize]
    tiles = torch.unflatten(torch.unflatten(weight, 1, (tile_columns, 4)), 0, (tile_rows, 4))
    # destinations as [tile row, row, tile column] of their own operand, put in the weight's order
    values, meta = packed[0].view(bits).view(tile_rows, 4, tile_columns, 2), packed[1].view(tile_rows, 4, -1)
    if transposed:
        values_t = packed[2].view(bits).view(tile_columns, 4, tile_rows, 2).permute(1, 2, 0, 3)
        meta_t = packed[3].view(tile_columns, 4, -1).permute(1, 2, 0)  # [column, word, tile column]
    # whole words of the transpose, so a multiple of four tile rows
    step = 4 * max(1, _TILES_PER_CHUNK.get(weight.device.type, 1 << 22) // (4 * tile_columns))
    for top in range(0, tile_rows, step):
        chunk = slice(top, top + step)
        planes = _planes(codes[chunk], dtype)
        planes.copy_(tiles[chunk].permute(3, 1, 0, 2))
        kept = _kept_masks(codes[chunk])
        wide = kept if bits == torch.int16 else kept.to(bits)
        _write_pairs(planes.view(bits), wide, values[chunk].transpose(0, 1))
        meta[chunk].transpose(0, 1).copy_(_words(_nibbles(kept), -1))
        if transposed:
            _write_pairs(planes.view(bits).transpose(0, 1), wide.transpose(0, 1), values_t[:, chunk])
            words = _words(_nibbles(kept.transpose(0, 1)), -2)
            meta_t[:, top // 4 : top // 4 + words.shape[1]].copy_(words)
    return packed


def empty_packed(weight: Tensor, dtype: torch.dtype, transposed: bool = True) -> list[Tensor]:
    """Return uninitialised ``values, meta`` of a weight ``[O, I]``, and ``values_t, meta_t`` if ``transposed``.

    Example:
        >>> [tuple(part.shape) for part in empty_packed(torch.empty(4, 36), torch.bfloat16)]
        [(4, 18), (4, 3), (36, 2), (36, 1)]
    """
    parts = []
    for rows, columns in (weight.shape, weight.shape[::-1])[: 1 + transposed]:
        parts.append(torch.empty(rows, columns // 2, dtype=dtype, device=weight.device))
        parts.append(torch.empty(rows, -(-columns // 16), dtype=torch.int16, device=weight.device))
    return parts


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
    shifts = torch.tensor([0, 4, 8, 12], device=meta.device)
    nibbles = (meta.long()[..., None] >> shifts & 0xF).flatten(1)[:, :groups]
    positions = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)  # [R, C/4, 2]
    dense = torch.zeros(rows, groups, 4, dtype=values.dtype, device=values.device)
    return dense.scatter_(2, positions, values.reshape(rows, groups, 2)).view(rows, groups * 4)


@torch.no_grad()
def place_words_(meta: Tensor, natural: Tensor, order: int, table: Tensor) -> None:
    """Write words of natural metadata to their places in an order; what lies between them stays.

    Args:
        meta: int16, contiguous, as large as the order needs; changed.
        natural: int16 ``[R, ceil(C/16)]``.
        order: A number of :class:`Order`.
        table: int32 ``[R·ceil(C/16)]``, the places if the order is ``Order.TABLE``; else anything.

    Example:
        >>> meta, words = torch.zeros(4, dtype=torch.int16), torch.tensor([[5, 7]], dtype=torch.int16)
        >>> place_words_(meta, words, Order.TABLE, torch.tensor([3, 1], dtype=torch.int32))
        >>> meta.tolist()
        [0, 7, 0, 5]
    """
    if order == Order.NATURAL:
        meta.view(natural.shape).copy_(natural)
        return
    known = None if order == Order.TABLE else _places(*natural.shape, order, natural.device)
    meta.view(-1).index_copy_(0, table.long() if known is None else known, natural.reshape(-1))


@lru_cache(maxsize=64)
def _places(rows: int, words: int, order: int, device: torch.device) -> Tensor:
    return metadata_places(rows, 16 * words, Order(order), device).flatten()


def _planes(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return uninitialised memory for the entries of tiles, ``[column, row, tile row, tile column]``."""
    # tile rows outermost in memory: two threads that halve an operation keep to their own rows
    tile_rows, tile_columns = codes.shape
    return torch.empty(tile_rows, 4, 4, tile_columns, dtype=dtype, device=codes.device).permute(1, 2, 0, 3)


def _kept_masks(codes: Tensor) -> Tensor:
    """Return int16 with all bits set where an entry is kept, ``[column, row, tile row, tile column]``."""
    masks = _planes(codes, torch.int16)
    for row in range(4):
        for column in range(4):
            bit_to_sign = torch.bitwise_left_shift(codes, 15 - 4 * row - column, out=masks[column, row])
            bit_to_sign.bitwise_right_shift_(15)
    return masks


def _nibbles(kept: Tensor) -> Tensor:
    """Return ``i0 | i1 << 2`` of four candidates along the first dimension."""
    first = kept[1].add(2).bitwise_and_(~kept[0])  # 0 if kept, or 1 if kept, or 2
    last = kept[2].mul(-4).add_(4).bitwise_and_(~kept[3])  # four times: 3 if kept, or 2 if kept, or 1
    return first.add_(last).add_(kept[3] & 12)


def _words(nibbles: Tensor, dim: int) -> Tensor:
    """Put every four nibbles along a dimension into one word."""
    missing = -nibbles.shape[dim] % 4
    if missing:
        padding = (0, missing) if dim == -1 else (0, 0, 0, missing)
        nibbles = torch.nn.functional.pad(nibbles, padding)
    fours = torch.unflatten(nibbles, dim, (-1, 4))
    word = torch.zeros_like(fours.select(dim, 0))
    for position in range(4):
        word.bitwise_or_(fours.select(dim, position) << 4 * position)
    return word


def _write_pairs(planes: Tensor, kept: Tensor, pairs: Tensor) -> None:
    """Write the kept two of four candidates along the first dimension, given as bits, into ``[..., 2]``."""
    first = planes[1] ^ planes[2]
    last = (first & kept[2]).bitwise_xor_(planes[1])  # 2 if kept, or 1
    first.bitwise_and_(kept[1]).bitwise_xor_(planes[2])  # 1 if kept, or 2
    first.bitwise_xor_((planes[0] ^ first).bitwise_and_(kept[0]))
    last.bitwise_xor_((planes[3] ^ last).bitwise_and_(kept[3]))
    if pairs.dtype == torch.int16:
        # one write of 32 bits is faster than two strided ones of 16
        both = (last.to(torch.int32) << 16).bitwise_or_(first.to(torch.int32).bitwise_and_(0xFFFF))
        pairs.view(torch.int32)[..., 0].copy_(both)
    else:
        pairs[..., 0].copy_(first)
        pairs[..., 1].copy_(last)
