"""Filling operands: masked weights packed, or masked and copied, into the forms of backends."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.masked_update.operator import apply_masks_
from ..kernels.pack.operator import pack_tiles_, unpack_rows
from .interface import Backend, Operand

SCRATCH_WORDS = 1 << 25
"""Words of metadata, 64 MiB, that are packed before they are reordered; at least those of one weight."""

_SCRATCH: dict[torch.device, Tensor] = {}
"""Natural metadata, at addresses that are the same in every step, so that launches reuse their tables of addresses."""


@dataclass
class Filling:
    """A backend's operands of one weight that are to be filled: W's, Wᵀ's or both.

    Args:
        weight: ``[O, I]``.
        codes: Of the entries that are packed: two of every four along rows for W's, along columns for Wᵀ's.
        backend: Whose operands they are.
        dtype: Of their values.
        operand: W's, or None.
        transpose: Wᵀ's, or None.
        within: Codes of a mask that prunes entries first: where they are packed, the value is zero.
    """

    weight: Tensor
    codes: Tensor
    backend: Backend
    dtype: torch.dtype
    operand: Operand | None = None
    transpose: Operand | None = None
    within: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """The matrix whose entries are packed."""
        if self.within is None:
            return self.weight.detach()
        masked = torch.empty_like(self.weight, dtype=self.dtype).copy_(self.weight)
        apply_masks_([masked], [self.within])
        return masked

    @property
    def parts(self) -> list[Operand]:
        """The operands there are."""
        return [part for part in (self.operand, self.transpose) if part is not None]

    @property
    def sides(self) -> list[tuple[Operand | None, tuple[int, int]]]:
        """What is packed, with its shape: W, and Wᵀ if it is wanted; W comes along even if it is not."""
        rows, columns = self.weight.shape
        both = [(self.operand, (rows, columns)), (self.transpose, (columns, rows))]
        return both if self.transpose is not None else both[:1]

    @property
    def scratch_words(self) -> int:
        """Words of metadata that need room beside the operands, each side at 16 bytes."""
        sizes = [_words(shape) for part, shape in self.sides if part is None or part.meta is None]
        return sum(size + -size % 8 for size in sizes)


def fill_(fillings: Iterable[Filling]) -> None:
    """Mask and pack weights into operands; equal layouts share a launch."""
    groups: dict[tuple[object, ...], list[Filling]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for filling in fillings:
            if any(part.values is None for part in filling.parts):
                _fill_from_matrix(filling)
            else:
                # alone if its source is a copy, so that there is one copy at a time
                alone = None if filling.within is None else id(filling)
                key = (filling.weight.device, filling.dtype, filling.transpose is None, alone)
                groups.setdefault(key, []).append(filling)
        for group in groups.values():
            for batch in _batches(group):
                _pack(batch)


def operand_of_packed(backend: Backend, values: Tensor, meta: Tensor) -> Operand:
    """Return packed rows ``values [R, C/2]``, natural ``meta [R, C/16]`` as an operand of a backend."""
    shape = (values.shape[0], 2 * values.shape[1])
    if backend.symmetric:
        return Operand(shape, (unpack_rows(values, meta),))
    operand = backend.allocate(shape, values.dtype, values.device)
    if operand.values is None:
        backend.finish_(operand, unpack_rows(values, meta))
        return operand
    operand.values.copy_(values)
    if operand.meta is None:
        backend.finish_(operand, meta)
    else:
        operand.meta.copy_(meta)
    return operand


def _words(shape: tuple[int, int]) -> int:
    return shape[0] * -(-shape[1] // 16)


def _batches(fillings: list[Filling]) -> Iterator[list[Filling]]:
    """Yield fillings whose metadata fits the scratch together."""
    batch: list[Filling] = []
    words = 0
    for filling in fillings:
        if batch and words + filling.scratch_words > SCRATCH_WORDS:
            yield batch
            batch, words = [], 0
        batch.append(filling)
        words += filling.scratch_words
    yield batch


def _pack(fillings: list[Filling]) -> None:
    scratch = _scratch(fillings[0].weight.device, sum(filling.scratch_words for filling in fillings))
    columns: list[list[Tensor]] = [[], [], [], []]
    for filling in fillings:
        for place, (part, shape) in enumerate(filling.sides):
            values, meta = (None, None) if part is None else (part.values, part.meta)
            if values is None:  # W's, which is not wanted
                values = torch.empty(shape[0], shape[1] // 2, dtype=filling.dtype, device=filling.weight.device)
            if meta is None:
                size = _words(shape)
                meta, scratch = scratch[:size].view(shape[0], -1), scratch[size + -size % 8 :]
            columns[2 * place].append(values)
            columns[2 * place + 1].append(meta)
    pack_tiles_([filling.source for filling in fillings], [filling.codes for filling in fillings], *columns)
    for position, filling in enumerate(fillings):
        for part, metas in ((filling.operand, columns[1]), (filling.transpose, columns[3])):
            if part is not None and part.meta is None:
                filling.backend.finish_(part, metas[position])


def _scratch(device: torch.device, words: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # the graph's own, which no later call frees
        return torch.empty(words, dtype=torch.int16, device=device)
    held = _SCRATCH.get(device)
    if held is None or held.numel() < words:
        held = _SCRATCH[device] = torch.empty(words, dtype=torch.int16, device=device)
    return held


def _fill_from_matrix(filling: Filling) -> None:
    first = filling.operand
    own = first is not None and first.tensors[0].shape == filling.weight.shape
    matrix = first.tensors[0] if own and first is not None else torch.empty_like(filling.weight, dtype=filling.dtype)
    matrix.copy_(filling.weight)
    for codes in (filling.codes, filling.within):
        if codes is not None:
            apply_masks_([matrix], [codes])
    if filling.operand is not None:
        filling.backend.finish_(filling.operand, matrix)
    if filling.transpose is not None:
        filling.backend.finish_(filling.transpose, matrix.t().contiguous())
