"""Packing by tile codes in planes that fit a CPU's caches, in natural order and in others."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..metadata_order import Order, metadata_places
from .sides import Side

TILES_PER_CHUNK = {"cpu": 1 << 17}  # whose planes stay in the caches
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def pack(weight: Tensor, codes: Tensor, dtype: torch.dtype, transposed: bool = True) -> list[Tensor]:
    """Pack a weight, and its transpose by the same mask; arguments and result are those of ``reference.pack``.

    Args:
        weight: ``[O, I]``, floating point, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]``; a side whose groups of four do not keep two means nothing.
        dtype: Of the values.
        transposed: Pack the transpose as well.

    Example:
        >>> weight, codes = torch.tensor([[1.0, 2, 3, 4]] * 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16)
        >>> pack(weight, codes, torch.float32, transposed=False)[0].tolist()[:2]
        [[2.0, 4.0], [1.0, 3.0]]
    """
    tile_rows, tile_columns = codes.shape
    packed, bits = empty_packed(weight, dtype, transposed), INTEGERS[dtype.itemsize]
    if weight.numel() == 0:
        return packed
    tiles = torch.unflatten(torch.unflatten(weight, 1, (tile_columns, 4)), 0, (tile_rows, 4))
    values = packed[0].view(bits).view(tile_rows, 4, tile_columns, 2).transpose(0, 1)  # [row, O/4, I/4, 2]
    meta = packed[1].view(tile_rows, 4, -1).transpose(0, 1)  # [row, O/4, word]
    if transposed:
        values_t = packed[2].view(bits).view(tile_columns, 4, tile_rows, 2).permute(1, 2, 0, 3)  # [column, O/4, I/4, 2]
        meta_t = packed[3].view(tile_columns, 4, -1).permute(1, 2, 0)  # [column, word, I/4]
    # whole words of the transpose, so a multiple of four tile rows
    step = 4 * max(1, TILES_PER_CHUNK.get(weight.device.type, 1 << 22) // (4 * tile_columns))
    for top in range(0, tile_rows, step):
        chunk, words = slice(top, top + step), slice(top // 4, (top + step) // 4)
        planes = _planes(codes[chunk], dtype)
        entries = planes.copy_(tiles[chunk].permute(3, 1, 0, 2)).view(bits)  # [column, row, O/4, I/4]
        kept = kept_masks(codes[chunk])
        wide = kept if bits == torch.int16 else kept.to(bits)
        _write_pairs(entries, wide, values[:, chunk])
        meta[:, chunk].copy_(_words(_nibbles(kept), -1))
        if transposed:
            _write_pairs(entries.transpose(0, 1), wide.transpose(0, 1), values_t[:, chunk])
            meta_t[:, words].copy_(_words(_nibbles(kept.transpose(0, 1)), -2))
    return packed


@torch.no_grad()
def pack_into(weights: Sequence[Tensor], codes: Sequence[Tensor], side: Side | None, side_t: Side | None) -> None:
    """Pack several weights by their codes into the targets of W, of Wᵀ or of both, as the kernel does.

    Args:
        weights: ``[O, I]`` each.
        codes: int16 ``[O/4, I/4]`` each.
        side: Targets of W, overwritten; or None.
        side_t: The same of Wᵀ.

    Example:
        >>> pack_into([], [], None, None)
    """
    sides = [given for given in (side, side_t) if given is not None]
    for position, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        if not sides:
            return
        packed = pack(weight, code, sides[0].values[position].dtype, transposed=side_t is not None)
        pairs = (packed[:2], packed[2:])[side is None :]
        for given, (values, meta) in zip(sides, pairs, strict=False):
            given.values[position].copy_(values)
            place_words_(given.meta[position], meta, given.orders[position], given.tables[position])


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


def kept_masks(codes: Tensor) -> Tensor:
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
