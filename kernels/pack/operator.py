"""Packing as torch operators: Triton on CUDA, ``cpu.py`` elsewhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..mask_search import search_transposable
from ..metadata_order import Order
from ..statistics import FIELDS, measure
from . import cpu, reference
from .arguments import require_packed, require_weight, sides_of
from .sides import Side


@torch.library.custom_op("sparsetrain::pack_tiles", mutates_args=())
def pack_tiles(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack a weight and its transpose by tile codes, for the products with W and with Wᵀ.

    Args:
        weight: ``[O, I]`` in float32, float16 or bfloat16, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]`` on the weight's device, transposable 2:4.
        dtype: Of the values: float32, float16 or bfloat16, rounded to nearest even.

    Returns:
        ``values [O, I/2]``, ``meta`` int16 ``[O, ceil(I/16)]``, and ``values_t [I, O/2]``, ``meta_t`` int16
        ``[I, ceil(O/16)]`` of the transpose. A word of ``meta`` holds a nibble ``i0 | i1 << 2`` for each of four fours
        of columns, from bit 0 up: the positions i0 < i1 that were kept; zero where no columns are left.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Example:
        >>> codes = torch.full((1, 4), 0x5A5A, dtype=torch.int16)
        >>> [tuple(part.shape) for part in pack_tiles(torch.randn(4, 16), codes, torch.bfloat16)]
        [(4, 8), (4, 1), (16, 2), (16, 1)]
    """
    require_weight(weight, codes, dtype)
    values, meta, values_t, meta_t = cpu.pack(weight, codes, dtype)
    return values, meta, values_t, meta_t


@torch.library.custom_op("sparsetrain::search_and_pack", mutates_args=())
def search_and_pack(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find the transposable mask of largest ``Σ|w|`` and pack by it, reading the weight once.

    Args:
        weight: ``[O, I]`` in float32, float16 or bfloat16, any strides; O and I multiples of 4.
        dtype: Of the values: float32, float16 or bfloat16.

    Returns:
        int16 codes ``[O/4, I/4]``, then what :func:`pack_tiles` returns.

    Raises:
        ValueError: If a shape or dtype does not fit.

    Example:
        >>> codes, values, *_ = search_and_pack(torch.randn(8, 16), torch.bfloat16)
        >>> codes.shape, values.shape
        (torch.Size([2, 4]), torch.Size([8, 8]))
    """
    require_weight(weight, None, dtype)
    codes = search_transposable(weight, magnitude=True)
    values, meta, values_t, meta_t = cpu.pack(weight, codes, dtype)
    return codes, values, meta, values_t, meta_t


@torch.library.custom_op("sparsetrain::pack_tiles_", mutates_args={"values", "meta", "values_t", "meta_t"})
def pack_tiles_(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> None:
    """Pack several weights by their codes into existing operands; on CUDA, one launch for each layout among them.

    Args:
        weights: As in :func:`pack_tiles`, each.
        codes: As in :func:`pack_tiles`, contiguous, each; W needs two of four along rows, Wᵀ along columns.
        values: Contiguous, shaped as :func:`pack_tiles` returns it, all of one dtype; overwritten. Or an empty list, to
            leave W out.
        meta: Metadata of W: int16, contiguous, shaped as there or, in another order, of the size that it needs; what is
            padding there stays as it is.
        values_t: The same of the transposes; or an empty list.
        meta_t: The same.
        tables: Int32, the places of a matrix's words: one for every ``Order.TABLE`` among the orders.
        orders: Numbers of :class:`..metadata_order.Order`: of every ``meta``, then of every ``meta_t``; None if all are
            natural.

    Raises:
        ValueError: If the lists or their entries do not fit; nothing is written then.

    Example:
        >>> weight, codes = torch.randn(4, 16), torch.full((1, 4), 0x5A5A, dtype=torch.int16)
        >>> parts = [[torch.empty_like(part)] for part in pack_tiles(weight, codes, torch.bfloat16)]
        >>> pack_tiles_([weight], [codes], *parts, [])
    """
    cpu.pack_into(weights, codes, *sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders))


@torch.library.custom_op(
    "sparsetrain::search_and_pack_", mutates_args={"codes", "values", "meta", "values_t", "meta_t"}
)
def search_and_pack_(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> Tensor:
    """Search the masks of several weights into their codes, pack by them and measure, reading every weight once.

    The arguments are those of :func:`pack_tiles_`; with no values at all, masks are searched and measured alone.

    Returns:
        float64 ``[weights, 6]`` on their device: what ``tile_statistics`` measures; entries whose mask changed count
        from the codes that were there.

    Raises:
        ValueError: If the lists or their entries do not fit; nothing is written then.

    Example:
        >>> weight = torch.randn(4, 16)
        >>> parts = [[torch.empty_like(part)] for part in search_and_pack(weight, torch.bfloat16)]
        >>> search_and_pack_([weight], *parts, []).shape
        torch.Size([1, 6])
    """
    sides = sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders)
    statistics = _empty_statistics(weights)
    for row, weight, code in zip(statistics, weights, codes, strict=True):
        found = search_transposable(weight, magnitude=True)
        row.copy_(measure(weight, found, code))
        code.copy_(found)
    cpu.pack_into(weights, codes, *sides)
    return statistics


@torch.library.custom_op("sparsetrain::unpack_rows", mutates_args=())
def unpack_rows(values: Tensor, meta: Tensor) -> Tensor:
    """Return the dense matrix of packed rows, of W or of Wᵀ.

    Args:
        values: ``[R, C/2]`` in float32, float16 or bfloat16.
        meta: int16 ``[R, ceil(C/16)]``, in the order of :func:`pack_tiles`.

    Returns:
        ``[R, C]`` in the values' dtype; zero where nothing was kept.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Example:
        >>> unpack_rows(torch.tensor([[2.0, 4.0]]), torch.tensor([[0xD]], dtype=torch.int16)).tolist()
        [[0.0, 2.0, 0.0, 4.0]]
    """
    require_packed(values, meta)
    return reference.unpack_rows(values, meta)


@unpack_rows.register_fake
def _(values: Tensor, meta: Tensor) -> Tensor:
    require_packed(values, meta)
    return values.new_empty(values.shape[0], 2 * values.shape[1])


@unpack_rows.register_kernel("cuda")
def _(values: Tensor, meta: Tensor) -> Tensor:
    from .triton_unpack import unpack_into

    require_packed(values, meta)
    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    if dense.numel():
        unpack_into(values.contiguous(), meta.contiguous(), dense)
    return dense


@pack_tiles.register_fake
def _(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_weight(weight, codes, dtype)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    return values, meta, values_t, meta_t


@search_and_pack.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_weight(weight, None, dtype)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    return _empty_codes(weight), values, meta, values_t, meta_t


@pack_tiles_.register_fake
def _(*given: Any) -> None:
    sides_of(*given)


@search_and_pack_.register_fake
def _(weights: Sequence[Tensor], *others: Any) -> Tensor:
    sides_of(weights, *others)
    return _empty_statistics(weights)


@pack_tiles.register_kernel("cuda")
def _(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_weight(weight, codes, dtype)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    pack_on_cuda([weight], [codes.contiguous()], _side([values], [meta]), _side([values_t], [meta_t]), search=False)
    return values, meta, values_t, meta_t


@search_and_pack.register_kernel("cuda")
def _(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_weight(weight, None, dtype)
    codes = _empty_codes(weight)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    pack_on_cuda([weight], [codes], _side([values], [meta]), _side([values_t], [meta_t]), search=True)
    return codes, values, meta, values_t, meta_t


@pack_tiles_.register_kernel("cuda")
def _(weights: Sequence[Tensor], codes: Sequence[Tensor], *targets: Any) -> None:
    pack_on_cuda(weights, codes, *sides_of(weights, codes, *targets), search=False)


@search_and_pack_.register_kernel("cuda")
def _(weights: Sequence[Tensor], codes: Sequence[Tensor], *targets: Any) -> Tensor:
    sides = sides_of(weights, codes, *targets)
    statistics = _empty_statistics(weights)
    pack_on_cuda(weights, codes, *sides, search=True, statistics=statistics)
    return statistics


def pack_on_cuda(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    side: Side | None,
    side_t: Side | None,
    search: bool,
    statistics: Tensor | None = None,
) -> None:
    """Pack several weights by the kernel; those without entries, and rows that are not contiguous, are seen to here."""
    from .triton_kernel import pack_into

    filled = [i for i, weight in enumerate(weights) if weight.numel()]
    if len(filled) < len(weights):
        if statistics is not None:
            statistics.zero_()
        if not filled:
            return
        part = None if statistics is None else statistics[filled]
        first, second = (None if each is None else each.of(filled) for each in (side, side_t))
        pack_on_cuda([weights[i] for i in filled], [codes[i] for i in filled], first, second, search, part)
        if statistics is not None and part is not None:
            statistics[filled] = part
        return
    sources = [weight if weight.stride(1) == 1 else weight.contiguous() for weight in weights]
    pack_into(sources, codes, side, side_t, search, statistics)


def _side(values: Sequence[Tensor], meta: Sequence[Tensor]) -> Side:
    """Return targets in natural order."""
    return Side(values, meta, [Order.NATURAL] * len(values), meta)


def _empty_statistics(weights: Sequence[Tensor]) -> Tensor:
    device = weights[0].device if weights else None
    return torch.empty(len(weights), len(FIELDS), dtype=torch.float64, device=device)


def _empty_codes(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0] // 4, weight.shape[1] // 4, dtype=torch.int16)
