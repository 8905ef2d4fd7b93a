"""Packing at once: eager execution spares the dispatcher, and what is known of the tensors is not asked again."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import Known, kernels_now, relaunched
from ..plan import Plans, layout_of
from .arguments import sides_of
from .operator import pack_on_cuda, pack_tiles_
from .sides import known_sides


def _pack_now_on_cuda(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None,
    known: Known | None,
) -> None:
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
        pack_on_cuda(weights, codes, *sides_of(weights, codes, *every, orders), search=False)
        return
    side, side_t = known_sides(values, meta, values_t, meta_t, orders)
    pack_into(weights, codes, side, side_t, search=False, plan=plan, known=known)


PACKINGS: Plans[tuple[Any]] = Plans()
NOW: dict[str, Callable[..., None]] = {"cuda": _pack_now_on_cuda}
"""By type of device, what the function below calls; elsewhere the operator."""


def pack_tiles_now_(
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
    known: Known | None = None,
) -> None:
    """Do what :func:`.operator.pack_tiles_` does, without the dispatcher, which looks at every tensor.

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
