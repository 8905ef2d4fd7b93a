"""Packing as torch operators: Triton on CUDA, ``cpu.py`` elsewhere."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import Known, kernels_now, relaunched
from ..mask_search import search_transposable
from ..metadata_order import Order, metadata_words
from ..plan import Plans, layout_of
from ..statistics import FIELDS, measure
from . import cpu, reference
from .sides import Side

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    _check(weight, codes, dtype)
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
    _check(weight, None, dtype)
    codes = search_transposable(weight, magnitude=True)
    values, meta, values_t, meta_t = cpu.pack(weight, codes, dtype)
    return codes, values, meta, values_t, meta_t


@torch.library.custom_op("sparsetrain::pack_tiles_", mutates_args={"values", "meta", "values_t", "meta_t"})
def pack_tiles_(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> None:  # fmt: skip
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
    _pack_in_torch(weights, codes, *sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders))


@torch.library.custom_op(
    "sparsetrain::search_and_pack_", mutates_args={"codes", "values", "meta", "values_t", "meta_t"}
)
def search_and_pack_(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
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
    _pack_in_torch(weights, codes, *sides)
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
    _check_packed(values, meta)
    return reference.unpack_rows(values, meta)


@unpack_rows.register_fake
def _(values: Tensor, meta: Tensor) -> Tensor:
    _check_packed(values, meta)
    return values.new_empty(values.shape[0], 2 * values.shape[1])


@unpack_rows.register_kernel("cuda")
def _(values: Tensor, meta: Tensor) -> Tensor:
    from .triton_kernel import unpack_into

    _check_packed(values, meta)
    dense = values.new_empty(values.shape[0], 2 * values.shape[1])
    if dense.numel():
        unpack_into(values.contiguous(), meta.contiguous(), dense)
    return dense


@pack_tiles.register_fake
def _(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(weight, codes, dtype)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    return values, meta, values_t, meta_t


@search_and_pack.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(weight, None, dtype)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    return _empty_codes(weight), values, meta, values_t, meta_t


@pack_tiles_.register_fake
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> None:  # fmt: skip
    sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders)


@search_and_pack_.register_fake
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders)
    return _empty_statistics(weights)


@pack_tiles.register_kernel("cuda")
def _(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(weight, codes, dtype)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    _pack_on_cuda([weight], [codes.contiguous()], _side([values], [meta]), _side([values_t], [meta_t]), search=False)
    return values, meta, values_t, meta_t


@search_and_pack.register_kernel("cuda")
def _(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(weight, None, dtype)
    codes = _empty_codes(weight)
    values, meta, values_t, meta_t = cpu.empty_packed(weight, dtype)
    _pack_on_cuda([weight], [codes], _side([values], [meta]), _side([values_t], [meta_t]), search=True)
    return codes, values, meta, values_t, meta_t


@pack_tiles_.register_kernel("cuda")
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> None:  # fmt: skip
    sides = sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders)
    _pack_on_cuda(weights, codes, *sides, search=False)


@search_and_pack_.register_kernel("cuda")
def _(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    sides = sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders)
    statistics = _empty_statistics(weights)
    _pack_on_cuda(weights, codes, *sides, search=True, statistics=statistics)
    return statistics


def _pack_now_on_cuda(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor], orders: Sequence[int] | None,
    known: Known | None,
) -> None:  # fmt: skip
    from .triton_kernel import pack_into, plan_of

    every = (values, meta, values_t, meta_t, tables)
    key: tuple[Hashable, ...]
    if known is None:
        key = layout_of(weights, codes, *every), None if orders is None else tuple(orders)
    else:
        key = known.layouts, layout_of(weights) if known.moving else None

    def made() -> Any:
        sides = sides_of(weights, codes, *every, orders)
        regular = all(weight.numel() and weight.stride(1) == 1 for weight in weights)
        return (plan_of(weights, codes, *sides) if regular and not tables else None,)

    (plan,) = PACKINGS.of(key, made)
    if plan is None:
        _pack_on_cuda(weights, codes, *sides_of(weights, codes, *every, orders), search=False)
        return
    numbers = [0] * (len(meta) + len(meta_t)) if orders is None else orders
    side = Side(values, meta, numbers[: len(meta)], meta) if values else None
    side_t = Side(values_t, meta_t, numbers[len(meta) :], meta_t) if values_t else None
    pack_into(weights, codes, side, side_t, search=False, plan=plan, known=known)


PACKINGS: Plans[tuple[Any]] = Plans()
NOW: dict[str, Callable[..., None]] = {"cuda": _pack_now_on_cuda}
"""By type of device, what the function below calls; elsewhere the operator."""


def pack_tiles_now_(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None = None, known: Known | None = None,
) -> None:  # fmt: skip
    """Do what :func:`pack_tiles_` does; eager execution spares the dispatcher, which looks at every tensor.

    Args:
        weights: As there, and so are the others.
        codes: See there.
        values: See there.
        meta: See there.
        values_t: See there.
        meta_t: See there.
        tables: See there.
        orders: See there.
        known: Of all these tensors and the orders, or of all but the weights, which are moving then. The versions of
            targets, which are in no graph, are not counted up. None to look at everything.

    Example:
        >>> pack_tiles_now_([], [], [], [], [], [], [])
    """
    kernel = kernels_now(NOW, known, weights, values, meta, values_t, meta_t, tables, codes)
    if kernel is None:
        pack_tiles_(weights, codes, values, meta, values_t, meta_t, tables, orders)
    elif not relaunched(known, codes[0]):
        kernel(weights, codes, values, meta, values_t, meta_t, tables, orders, known)
        if known is None:
            torch.autograd.graph.increment_version([*values, *meta, *values_t, *meta_t])


def _pack_on_cuda(
    weights: Sequence[Tensor], codes: Sequence[Tensor], side: Side | None, side_t: Side | None, search: bool,
    statistics: Tensor | None = None,
) -> None:  # fmt: skip
    from .triton_kernel import pack_into

    filled = [i for i, weight in enumerate(weights) if weight.numel()]
    if len(filled) < len(weights):
        if statistics is not None:
            statistics.zero_()
        if not filled:
            return
        part = None if statistics is None else statistics[filled]
        first, second = (None if each is None else each.of(filled) for each in (side, side_t))
        _pack_on_cuda([weights[i] for i in filled], [codes[i] for i in filled], first, second, search, part)
        if statistics is not None and part is not None:
            statistics[filled] = part
        return
    sources = [weight if weight.stride(1) == 1 else weight.contiguous() for weight in weights]
    pack_into(sources, codes, side, side_t, search, statistics)


def _pack_in_torch(weights: Sequence[Tensor], codes: Sequence[Tensor], side: Side | None, side_t: Side | None) -> None:
    sides = [given for given in (side, side_t) if given is not None]
    for position, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        if not sides:
            return
        packed = cpu.pack(weight, code, sides[0].values[position].dtype, transposed=side_t is not None)
        pairs = (packed[:2], packed[2:])[side is None :]
        for given, (values, meta) in zip(sides, pairs, strict=False):
            given.values[position].copy_(values)
            cpu.place_words_(given.meta[position], meta, given.orders[position], given.tables[position])


def _side(values: Sequence[Tensor], meta: Sequence[Tensor]) -> Side:
    """Return targets in natural order."""
    return Side(values, meta, [Order.NATURAL] * len(values), meta)


def _empty_statistics(weights: Sequence[Tensor]) -> Tensor:
    device = weights[0].device if weights else None
    return torch.empty(len(weights), len(FIELDS), dtype=torch.float64, device=device)


def _empty_codes(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0] // 4, weight.shape[1] // 4, dtype=torch.int16)


def _check(weight: Tensor, codes: Tensor | None, dtype: torch.dtype) -> None:
    if weight.dim() != 2 or weight.shape[0] % 4 or weight.shape[1] % 4 or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}: it must be a float32, float16 or bfloat16 matrix whose "
            "sizes are multiples of 4, so convert or pad it."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: values are packed in torch.float32, torch.float16 or torch.bfloat16.")
    if codes is None:
        return
    shape = (weight.shape[0] // 4, weight.shape[1] // 4)
    if codes.dtype != torch.int16 or tuple(codes.shape) != shape or codes.device != weight.device:
        raise ValueError(
            f"codes is {codes.dtype} {tuple(codes.shape)} on {codes.device}: it must be torch.int16 {shape} on "
            f"{weight.device}, as for a weight {tuple(weight.shape)}."
        )


def _check_packed(values: Tensor, meta: Tensor) -> None:
    if values.dim() != 2 or values.shape[1] % 2 or values.dtype not in DTYPES:
        raise ValueError(
            f"values is {values.dtype} {tuple(values.shape)}: it must be [R, C/2] in float32, float16 or bfloat16, C a "
            "multiple of 4."
        )
    shape = (values.shape[0], -(-values.shape[1] // 8))
    if meta.dtype != torch.int16 or tuple(meta.shape) != shape or meta.device != values.device:
        raise ValueError(
            f"meta is {meta.dtype} {tuple(meta.shape)} on {meta.device}: with values {tuple(values.shape)} it must be "
            f"torch.int16 {shape} on {values.device}."
        )


def sides_of(
    weights: Sequence[Tensor], codes: Sequence[Tensor], values: Sequence[Tensor], meta: Sequence[Tensor],
    values_t: Sequence[Tensor], meta_t: Sequence[Tensor], tables: Sequence[Tensor],
    orders: Sequence[int] | None,
) -> tuple[Side | None, Side | None]:  # fmt: skip
    """Return the targets of W and of Wᵀ, if they are wanted, or raise ``ValueError`` where something does not fit."""
    sizes = [len(column) for column in (weights, codes, values, meta, values_t, meta_t)]
    count = len(weights)
    if len(codes) != count or any(tuple(pair) not in ((0, 0), (count, count)) for pair in (sizes[2:4], sizes[4:])):
        raise ValueError(
            f"weights, codes, values, meta, values_t, meta_t have {sizes} entries: pass one of each for every weight, "
            "and of values and meta, or of values_t and meta_t, also none."
        )
    known = [Order(order) for order in orders] if orders is not None else [Order.NATURAL] * (len(meta) + len(meta_t))
    rest = iter(tables)
    places = [next(rest, None) if order == Order.TABLE else None for order in known]
    if len(known) != len(meta) + len(meta_t) or len(tables) != known.count(Order.TABLE):
        raise ValueError(
            f"orders and tables have {len(known)} and {len(tables)} entries: pass an order for each of "
            f"{len(meta) + len(meta_t)} meta and meta_t, and a table for each Order.TABLE among them."
        )
    dtype = next((entry.dtype for entry in (*values, *values_t)), torch.float32)
    for position, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        _check(weight, code, dtype)
        _check_target(f"codes[{position}]", code, torch.int16, tuple(code.shape), weight.device)
    sides: list[Side | None] = []
    for suffix, packed, words, first in (("", values, meta, 0), ("_t", values_t, meta_t, len(meta))):
        own, table = known[first : first + len(packed)], places[first : first + len(packed)]
        for position, target in enumerate(packed):
            device, shape = weights[position].device, weights[position].shape
            rows, columns = (shape[0], shape[1]) if not suffix else (shape[1], shape[0])
            _check_target(f"values{suffix}[{position}]", target, dtype, (rows, columns // 2), device)
            _check_meta(
                f"meta{suffix}[{position}]", words[position], rows, columns, own[position], table[position], device
            )
        entries = [meant if entry is None else entry for entry, meant in zip(table, words, strict=True)]
        sides.append(Side(packed, words, own, entries) if packed else None)
    return sides[0], sides[1]


def _check_meta(
    name: str, meta: Tensor, rows: int, columns: int, order: Order, table: Tensor | None, device: torch.device
) -> None:
    if order == Order.NATURAL:
        _check_target(name, meta, torch.int16, (rows, -(-columns // 16)), device)
        return
    if table is not None:
        _check_target(f"the table of {name}", table, torch.int32, (rows * -(-columns // 16),), device)
    size = meta.numel() if table is not None else metadata_words(rows, columns, order)
    if size == 0 and meta.numel():
        raise ValueError(f"order of {name} is {order.name}: a matrix [{rows}, {columns}] has none; use another order.")
    _check_target(name, meta.view(-1) if meta.is_contiguous() else meta, torch.int16, (size,), device)


def _check_target(name: str, target: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    fits = target.dtype == dtype and tuple(target.shape) == shape and target.is_contiguous()
    if not fits or target.device != device:
        raise ValueError(
            f"{name} is {target.dtype} {tuple(target.shape)} on {target.device}: it must be contiguous {dtype} {shape} "
            f"on {device}."
        )
