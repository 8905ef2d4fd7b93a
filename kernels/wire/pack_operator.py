"""Packing wires into operands as a torch operator, and at once, without the dispatcher."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..launch import kernels_now
from ..pack import Side
from ..pack.sides import known_sides
from ..plan import Plans, layout_of
from . import cpu
from .arguments import wire_sides_of


@torch.library.custom_op("sparsetrain::pack_wires_", mutates_args={"values", "meta", "values_t", "meta_t"})
def pack_wires_(
    kept: Sequence[Tensor],
    numbers: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> None:
    """Pack several wires into existing operands; on CUDA, one launch for each layout, and no dense weight.

    The operands have the bits that ``pack_tiles_`` makes of the masked weight and its codes.

    Args:
        kept: The values of wires, as in :func:`from_wire`, all of one dtype.
        numbers: Theirs.
        values: As in :func:`..pack.operator.pack_tiles_`, in the dtype of ``kept``, and so are the others.
        meta: See there.
        values_t: See there.
        meta_t: See there.
        tables: See there.
        orders: See there.

    Raises:
        ValueError: If the lists or their entries do not fit; nothing is written then.

    Example:
        >>> wire = [torch.ones(4, 2)], [torch.zeros(1, 1, dtype=torch.uint8)]
        >>> values, meta = torch.empty(4, 2), torch.empty(4, 1, dtype=torch.int16)
        >>> pack_wires_(*wire, [values], [meta], [], [], [])
        >>> values.sum().item(), [hex(word) for word in meta.flatten().tolist()]
        (8.0, ['0xe', '0xe', '0x4', '0x4'])
    """
    cpu.pack_wires_into(kept, numbers, *wire_sides_of(kept, numbers, values, meta, values_t, meta_t, tables, orders))


@pack_wires_.register_fake
def _(*given: Any) -> None:
    wire_sides_of(*given)


@pack_wires_.register_kernel("cuda")
def _(kept: Sequence[Tensor], numbers: Sequence[Tensor], *targets: Any) -> None:
    _pack_on_cuda(kept, numbers, *wire_sides_of(kept, numbers, *targets))


def _pack_on_cuda(kept: Sequence[Tensor], numbers: Sequence[Tensor], side: Side | None, side_t: Side | None) -> None:
    """Pack several wires by the kernel, but for those without entries."""
    from .triton_kernel import pack_wires_into

    filled = [position for position, values in enumerate(kept) if values.numel()]
    if filled and (side or side_t):
        first, second = (None if each is None else each.of(filled) for each in (side, side_t))
        pack_wires_into([kept[i] for i in filled], [numbers[i] for i in filled], first, second)


def _pack_now_on_cuda(kept: Sequence[Tensor], numbers: Sequence[Tensor], *targets: Any) -> None:
    from .triton_kernel import pack_wires_into, plan_of

    values, meta, values_t, meta_t, tables, orders = targets

    def made() -> tuple[Any]:
        sides = wire_sides_of(kept, numbers, *targets)
        return (plan_of(kept, numbers, *sides) if all(map(Tensor.numel, kept)) and not tables else None,)

    layout = layout_of(kept, numbers, *targets[:5])
    (plan,) = PACKINGS.of((layout, None if orders is None else tuple(orders)), made)
    if plan is None:
        _pack_on_cuda(kept, numbers, *wire_sides_of(kept, numbers, *targets))
    else:
        pack_wires_into(kept, numbers, *known_sides(values, meta, values_t, meta_t, orders), plan=plan)


PACKINGS: Plans[tuple[Any]] = Plans()
NOW: dict[str, Callable[..., None]] = {"cuda": _pack_now_on_cuda}
"""By type of device, what the function below calls; elsewhere the operator."""


def pack_wires_now_(
    kept: Sequence[Tensor],
    numbers: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None = None,
) -> None:
    """Do what :func:`pack_wires_` does; eager execution spares the dispatcher, which looks at every tensor.

    Args:
        kept: As there, and so are the others.
        numbers: See there.
        values: See there.
        meta: See there.
        values_t: See there.
        meta_t: See there.
        tables: See there.
        orders: See there.

    Example:
        >>> pack_wires_now_([], [], [], [], [], [], [])
    """
    kernel = kernels_now(NOW, None, values, meta, values_t, meta_t, tables, numbers, kept)
    (kernel or pack_wires_)(kept, numbers, values, meta, values_t, meta_t, tables, orders)
    if kernel is not None:
        torch.autograd.graph.increment_version([*values, *meta, *values_t, *meta_t])
