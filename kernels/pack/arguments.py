"""What the packing operators are given, checked: weights and codes, packed rows, and the targets as sides."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import KERNEL_DTYPES
from ..metadata_order import Order, metadata_words
from .sides import Side


def require_weight(weight: Tensor, codes: Tensor | None, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` unless a weight can be packed by its codes (None: not given) into a dtype."""
    if weight.dim() != 2 or weight.shape[0] % 4 or weight.shape[1] % 4 or weight.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"weight is {weight.dtype} {tuple(weight.shape)}: it must be a float32, float16 or bfloat16 matrix whose "
            "sizes are multiples of 4, so convert or pad it."
        )
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"dtype is {dtype}: values are packed in torch.float32, torch.float16 or torch.bfloat16.")
    if codes is None:
        return
    shape = (weight.shape[0] // 4, weight.shape[1] // 4)
    if codes.dtype != torch.int16 or tuple(codes.shape) != shape or codes.device != weight.device:
        raise ValueError(
            f"codes is {codes.dtype} {tuple(codes.shape)} on {codes.device}: it must be torch.int16 {shape} on "
            f"{weight.device}, as for a weight {tuple(weight.shape)}."
        )


def require_packed(values: Tensor, meta: Tensor) -> None:
    """Raise ``ValueError`` unless these are packed rows in natural order."""
    if values.dim() != 2 or values.shape[1] % 2 or values.dtype not in KERNEL_DTYPES:
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


def sides_of(weights: Sequence[Tensor], codes: Sequence[Tensor], *targets: Any) -> tuple[Side | None, Side | None]:
    """Return the targets of W and of Wᵀ, if they are wanted, or raise ``ValueError`` where something does not fit.

    Args:
        weights: As ``pack_tiles_`` takes them.
        codes: Likewise.
        targets: The others, as :func:`targets_of` takes them.
    """
    require_lists("weights, codes", (weights, codes), targets[:4])
    dtype = next((entry.dtype for entry in (*targets[0], *targets[2])), torch.float32)
    for position, (weight, code) in enumerate(zip(weights, codes, strict=True)):
        require_weight(weight, code, dtype)
        require_tensor(f"codes[{position}]", code, torch.int16, tuple(code.shape), weight.device)
    return targets_of([(*weight.shape,) for weight in weights], weights, dtype, *targets)


def require_lists(names: str, sources: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]) -> None:
    """Raise ``ValueError`` unless lists of two sources and four targets are as long as the first, or left out."""
    sizes = [len(column) for column in (*sources, *targets)]
    count = sizes[0]
    if sizes[1] != count or any(tuple(pair) not in ((0, 0), (count, count)) for pair in (sizes[2:4], sizes[4:])):
        raise ValueError(
            f"{names}, values, meta, values_t, meta_t have {sizes} entries: pass one of each for every weight, "
            "and of values and meta, or of values_t and meta_t, also none."
        )


def targets_of(
    shapes: Sequence[tuple[int, ...]],
    sources: Sequence[Tensor],
    dtype: torch.dtype,
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,  # an operator's default does not come to its kernels
) -> tuple[Side | None, Side | None]:
    """Return the targets of W and of Wᵀ of weights ``[O, I]`` on their sources' devices, checked, as sides."""
    known, places = _orders_of(len(meta) + len(meta_t), orders, tables)
    sides: list[Side | None] = []
    for suffix, packed, words, first in (("", values, meta, 0), ("_t", values_t, meta_t, len(meta))):
        own, table = known[first : first + len(packed)], places[first : first + len(packed)]
        for position, target in enumerate(packed):
            device, shape = sources[position].device, shapes[position]
            rows, columns = shape if not suffix else shape[::-1]
            require_tensor(f"values{suffix}[{position}]", target, dtype, (rows, columns // 2), device)
            _check_meta(
                f"meta{suffix}[{position}]", words[position], rows, columns, own[position], table[position], device
            )
        entries = [meant if entry is None else entry for entry, meant in zip(table, words, strict=True)]
        sides.append(Side(packed, words, own, entries) if packed else None)
    return sides[0], sides[1]


def _orders_of(
    count: int, orders: Sequence[int] | None, tables: Sequence[Tensor]
) -> tuple[list[Order], list[Tensor | None]]:
    """Return the order of each of ``meta`` and ``meta_t``, natural by default, and the table where it is one."""
    known = [Order.NATURAL] * count if orders is None else [Order(order) for order in orders]
    if len(known) != count or len(tables) != known.count(Order.TABLE):
        raise ValueError(
            f"orders and tables have {len(known)} and {len(tables)} entries: pass an order for each of {count} meta "
            "and meta_t, and a table for each Order.TABLE among them."
        )
    rest = iter(tables)
    return known, [next(rest) if order == Order.TABLE else None for order in known]


def _check_meta(
    name: str, meta: Tensor, rows: int, columns: int, order: Order, table: Tensor | None, device: torch.device
) -> None:
    if order == Order.NATURAL:
        require_tensor(name, meta, torch.int16, (rows, -(-columns // 16)), device)
        return
    if table is not None:
        require_tensor(f"the table of {name}", table, torch.int32, (rows * -(-columns // 16),), device)
    size = meta.numel() if table is not None else metadata_words(rows, columns, order)
    if size == 0 and meta.numel():
        raise ValueError(f"order of {name} is {order.name}: a matrix [{rows}, {columns}] has none; use another order.")
    require_tensor(name, meta.view(-1) if meta.is_contiguous() else meta, torch.int16, (size,), device)


def require_tensor(name: str, target: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ``ValueError`` unless a tensor is contiguous and what it has to be."""
    fits = target.dtype == dtype and tuple(target.shape) == shape and target.is_contiguous()
    if not fits or target.device != device:
        raise ValueError(
            f"{name} is {target.dtype} {tuple(target.shape)} on {target.device}: it must be contiguous {dtype} {shape} "
            f"on {device}."
        )
