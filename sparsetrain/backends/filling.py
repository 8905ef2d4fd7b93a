"""Filling operands: masked weights packed, or masked and copied, into the forms of backends."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.masked_update.operator import apply_masks_
from ..kernels.pack.operator import pack_tiles_
from .interface import Backend, Operand

PARTS = {"operand": False, "transpose": True}


@dataclass
class Filling:
    """A backend's operands of one weight that are to be filled: W's, Wᵀ's or both."""

    weight: Tensor
    codes: Tensor
    backend: Backend
    dtype: torch.dtype
    operand: Operand | None = None
    transpose: Operand | None = None

    @property
    def parts(self) -> list[Operand]:
        """The operands there are."""
        return [part for part in (self.operand, self.transpose) if part is not None]


@torch.no_grad()
def fill_(fillings: Iterable[Filling]) -> None:
    """Mask and pack weights into operands."""
    both: dict[tuple[torch.device, torch.dtype], list[Filling]] = {}
    alone: dict[tuple[torch.device, torch.dtype], list[Filling]] = {}
    for filling in fillings:
        if any(part.values is None for part in filling.parts):
            _fill_from_matrix(filling)
        else:
            group = alone if filling.transpose is None else both
            group.setdefault((filling.weight.device, filling.dtype), []).append(filling)
    for groups, transposed in ((both, True), (alone, False)):
        for members in groups.values():
            _pack(members, transposed)


def _pack(fillings: list[Filling], transposed: bool) -> None:
    columns: list[list[Tensor]] = [[], [], [], []]
    for filling in fillings:
        rows, size = filling.weight.shape
        for place, (part, shape) in enumerate(
            [(filling.operand, (rows, size)), (filling.transpose, (size, rows))][: 1 + transposed]
        ):
            values, meta = _targets(part, shape, filling)
            columns[2 * place].append(values)
            columns[2 * place + 1].append(meta)
    weights = [filling.weight.detach() for filling in fillings]
    pack_tiles_(weights, [filling.codes for filling in fillings], *columns)
    for position, filling in enumerate(fillings):
        for part, metas in ((filling.operand, columns[1]), (filling.transpose, columns[3])):
            if part is not None and part.meta is None:
                filling.backend.finish_(part, metas[position])


def _targets(part: Operand | None, shape: tuple[int, int], filling: Filling) -> tuple[Tensor, Tensor]:
    # what the operand has no room for is scratch: metadata to be reordered, or a side that is not wanted
    device = filling.weight.device
    values = part.values if part is not None else None
    meta = part.meta if part is not None else None
    if values is None:
        values = torch.empty(shape[0], shape[1] // 2, dtype=filling.dtype, device=device)
    if meta is None:
        meta = torch.empty(shape[0], -(-shape[1] // 16), dtype=torch.int16, device=device)
    return values, meta


def _fill_from_matrix(filling: Filling) -> None:
    first = filling.operand
    own = first is not None and first.tensors[0].shape == filling.weight.shape
    matrix = first.tensors[0] if own and first is not None else torch.empty_like(filling.weight, dtype=filling.dtype)
    matrix.copy_(filling.weight)
    apply_masks_([matrix], [filling.codes])
    if filling.operand is not None:
        filling.backend.finish_(filling.operand, matrix)
    if filling.transpose is not None:
        filling.backend.finish_(filling.transpose, matrix.t().contiguous())
