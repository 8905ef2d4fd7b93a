"""Wires in planes that fit a CPU's caches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pack import Side
from ..pack.cpu import INTEGERS, TILES_PER_CHUNK, kept_masks, pack, pack_into
from .numbering import codes_of, numbers_of


@torch.no_grad()
def to_wire_into(weight: Tensor, codes: Tensor, values: Tensor, numbers: Tensor) -> None:
    """Write the wire of a weight, and zeros into rows beyond it.

    Args:
        weight: ``[O, I]``, floating point, any strides.
        codes: int16 ``[O/4, I/4]``.
        values: ``[R, I/2]``, R at least O; overwritten.
        numbers: uint8 ``[R/4, I/4]``; overwritten.

    Example:
        >>> values, numbers = torch.empty(8, 2), torch.empty(2, 1, dtype=torch.uint8)
        >>> to_wire_into(torch.ones(4, 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16), values, numbers)
        >>> values[:, 0].tolist(), numbers.flatten().tolist()
        ([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [23, 0])
    """
    rows = weight.shape[0]
    values[:rows] = pack(weight, codes, values.dtype, transposed=False)[0]
    numbers[: rows // 4] = numbers_of(codes)
    values[rows:], numbers[rows // 4 :] = 0, 0


@torch.no_grad()
def from_wire_into(values: Tensor, numbers: Tensor, dense: Tensor) -> None:
    """Write the masked weight of a wire, bit for bit; +0 where nothing was kept.

    Args:
        values: ``[O, I/2]``, contiguous.
        numbers: uint8 ``[O/4, I/4]``.
        dense: The values' dtype ``[O, I]``, contiguous; overwritten.

    Example:
        >>> dense = torch.empty(4, 4)
        >>> from_wire_into(torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.uint8), dense)
        >>> dense.tolist()[0]
        [0.0, 0.0, 1.0, 1.0]
    """
    tile_rows, tile_columns = numbers.shape
    bits, codes = INTEGERS[values.dtype.itemsize], codes_of(numbers)
    pairs = values.view(bits).view(tile_rows, 4, tile_columns, 2).transpose(0, 1)  # [row, O/4, I/4, 2]
    entries = dense.view(bits).view(tile_rows, 4, tile_columns, 4).transpose(0, 1)  # [row, O/4, I/4, column]
    step = max(1, TILES_PER_CHUNK.get(values.device.type, 1 << 22) // max(1, tile_columns))
    for top in range(0, tile_rows, step):
        chunk = slice(top, top + step)
        kept = kept_masks(codes[chunk]).to(bits)  # [column, row, O/4, I/4]
        first, last = pairs[:, chunk, :, 0], pairs[:, chunk, :, 1]
        either, part = first ^ last, entries[:, chunk]
        part[..., 0] = first & kept[0]
        part[..., 1] = ((either & kept[0]) ^ first) & kept[1]  # the last one if 0 is kept
        part[..., 2] = ((either & kept[3]) ^ last) & kept[2]  # the first one if 3 is kept
        part[..., 3] = last & kept[3]


@torch.no_grad()
def pack_wires_into(kept: Sequence[Tensor], numbers: Sequence[Tensor], side: Side | None, side_t: Side | None) -> None:
    """Pack several wires into the targets of W, of Wᵀ or of both, one after the other through a dense weight.

    Args:
        kept: The wires' values, ``[O, I/2]`` each, contiguous.
        numbers: uint8 ``[O/4, I/4]`` each.
        side: Targets of W, overwritten; or None.
        side_t: The same of Wᵀ.

    Example:
        >>> pack_wires_into([], [], None, None)
    """
    for position, (values, number) in enumerate(zip(kept, numbers, strict=True)):
        dense = values.new_empty(values.shape[0], 2 * values.shape[1])
        from_wire_into(values, number, dense)
        targets = [None if each is None else each.of([position]) for each in (side, side_t)]
        pack_into([dense], [codes_of(number)], *targets)
