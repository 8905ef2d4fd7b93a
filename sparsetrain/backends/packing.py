"""Pack jobs: masked weights packed, or masked and copied, into the operands of backends."""

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.launch import Known, Launch
from ..kernels.masked_update.operator import apply_masks_
from ..kernels.metadata_order import Order
from ..kernels.pack import unpack_rows
from ..kernels.pack.eager import pack_tiles_now_
from .interface import Backend, Operand


@dataclass(eq=False)
class PackJob:
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
    batches: "Batches | None" = field(default=None, repr=False)  # whose first this was when it was last filled

    @property
    def source(self) -> Tensor:
        """The matrix whose entries are packed."""
        if self.within is None:
            return self.weight
        masked = torch.empty_like(self.weight, dtype=self.dtype).copy_(self.weight)
        apply_masks_([masked], [self.within])
        return masked

    @cached_property
    def kind(self) -> tuple[object, ...] | None:
        """What jobs have in common that are packed in one call; None if the packer does not write its operands."""
        if not are_packed(self.operand, self.transpose):
            return None
        # alone if its source is a copy, so that there is one copy at a time
        alone = None if self.within is None else id(self)
        return self.dtype, self.operand is None, self.transpose is None, alone


def are_packed(*operands: Operand | None) -> bool:
    """Say whether the packer writes operands; None for one that there is not."""
    return not any(operand is not None and operand.values is None for operand in operands)


def jobs_of(
    weight: Tensor,
    codes: Tensor,
    backward: Tensor | None,
    backend: Backend,
    dtype: torch.dtype,
    operand: Operand | None,
    transpose: Operand | None,
) -> list[PackJob]:
    """Return how W's and Wᵀ's operand of a backend are filled: together, but where backward codes prune Wᵀ alone."""
    if backward is None or transpose is None:
        return [PackJob(weight, codes, backend, dtype, operand, transpose)]
    again = PackJob(weight, backward, backend, dtype, None, transpose, within=codes)
    return [again] if operand is None else [PackJob(weight, codes, backend, dtype, operand), again]


def fill_(jobs: Sequence[PackJob]) -> None:
    """Mask and pack weights into operands; equal layouts share a launch."""
    if not jobs:
        return
    with torch.inference_mode(False), torch.no_grad():
        batches = Batches.of(jobs)
        for position in batches.alone:
            _fill_from_matrix(jobs[position])
        for batch in batches.packed:
            batch.pack_(jobs)


class Packed(NamedTuple):
    """A matrix ``[R, C]`` as the packer writes it: two of every four entries along a row, and where they were.

    Args:
        values: ``[R, C/2]``.
        meta: int16; in natural order ``[R, ceil(C/16)]``.
    """

    values: Tensor
    meta: Tensor


def operand_of_packed(backend: Backend, packed: Packed) -> Operand:
    """Return a matrix that is packed in natural order as an operand of a backend."""
    values, meta = packed
    shape = (values.shape[0], 2 * values.shape[1])
    if backend.symmetric:
        return Operand(shape, (unpack_rows(*packed),))
    operand = backend.allocate(shape, values.dtype, values.device)
    if operand.values is None:
        backend.finish_(operand, unpack_rows(*packed))
        return operand
    operand.values.copy_(values)
    if operand.meta is not None and operand.order == Order.NATURAL:
        operand.meta.copy_(meta)
    else:
        backend.finish_(operand, meta)
    return operand


class Batch:
    """Fillings that are packed in one call, and the packer's arguments, which stay those of these very objects.

    It holds none of them: the first of all holds it.

    Args:
        jobs: All that there are.
        positions: Of those that are packed in this call.
    """

    def __init__(self, jobs: Sequence[PackJob], positions: Sequence[int]) -> None:
        own = [jobs[position] for position in positions]
        self._positions = positions
        self._weights = [job.weight for job in own]
        self._codes = [job.codes for job in own]
        self._targets = Targets([(job.operand, job.transpose) for job in own])
        self._number = next(_NUMBERS)  # an operand's tensors stay as they are, so this tells all but the weights
        self._launches: dict[Hashable, list[Launch]] = {}
        self.stays = not self._targets.unordered and all(job.within is None for job in own)
        """Whether it holds no scratch memory."""

    def pack_(self, jobs: Sequence[PackJob], known: Known | None = None) -> None:
        """Pack the weights as they are now."""
        targets, weights, number = self._targets, self._weights, self._number
        if known is not None and self.stays:
            known = Known((number, known.layouts), (number, known.places), kept=self._launches)
        else:
            known = Known(number, number, moving=1)
        if not self.stays:
            weights = [jobs[position].source for position in self._positions]
        values, meta, values_t, meta_t = targets.columns
        pack_tiles_now_(weights, self._codes, values, meta, values_t, meta_t, targets.tables, targets.orders, known)
        for position, operand, natural in targets.unordered:
            jobs[self._positions[position]].backend.finish_(operand, natural)


class Batches:
    """Fillings in batches of a kind, and those that the packer does not fill."""

    def __init__(self, jobs: Sequence[PackJob]) -> None:
        self._others = list(jobs[1:])  # not the first, whose this is
        self.alone = [position for position, job in enumerate(jobs) if job.kind is None]
        kinds: dict[tuple[object, ...], list[int]] = {}
        for position, job in enumerate(jobs):
            if job.kind is not None:
                kinds.setdefault((job.weight.device, job.kind), []).append(position)
        self.packed = [Batch(jobs, alike) for alike in kinds.values()]
        self.stay = not self.alone and all(batch.stays for batch in self.packed)
        """Whether :meth:`fill_` can fill them again."""

    def fill_(self, known: Known) -> None:
        """Fill them again from weights that are known."""
        with torch.inference_mode(False), torch.no_grad():
            for batch in self.packed:
                batch.pack_((), known)

    @classmethod
    def of(cls, jobs: Sequence[PackJob]) -> "Batches":
        """Return the batches of these jobs: the last ones of the first, if they were of the same."""
        kept = jobs[0].batches
        if kept is not None and kept._others == jobs[1:]:
            return kept
        made = cls(jobs)
        jobs[0].batches = made if all(batch.stays for batch in made.packed) else None
        return made


_NUMBERS = itertools.count(1)


class Targets:
    """Where operands of several weights are packed, as the packer takes it.

    Args:
        operands: W's and Wᵀ's of every weight; None for one that no weight has.
    """

    def __init__(self, operands: Sequence[tuple[Operand | None, Operand | None]]) -> None:
        self.columns: tuple[list[Tensor], ...] = ([], [], [], [])  # values, meta, values_t, meta_t
        self.tables: list[Tensor] = []
        self.orders: list[int] = []
        self.unordered: list[tuple[int, Operand, Tensor]] = []  # whose bytes or nibbles are moved afterwards
        for side in (0, 1):
            for position, pair in enumerate(operands):
                operand = pair[side]
                if operand is not None:
                    self._add(position, operand, *self.columns[2 * side : 2 * side + 2])

    def _add(self, position: int, operand: Operand, values: list[Tensor], metas: list[Tensor]) -> None:
        assert operand.values is not None
        meta = operand.meta
        if meta is None:
            size = (operand.shape[0], -(-operand.shape[1] // 16))
            meta = torch.empty(size, dtype=torch.int16, device=operand.values.device)
            self.unordered.append((position, operand, meta))
        values.append(operand.values)
        metas.append(meta)
        self.orders.append(int(operand.order))
        if operand.order == Order.TABLE:
            assert operand.places is not None
            self.tables.append(operand.places)


def _fill_from_matrix(job: PackJob) -> None:
    matrix = matrix_for(job.operand, job.weight.shape, job.weight, job.dtype)
    matrix.copy_(job.weight)
    for codes in (job.codes, job.within):
        if codes is not None:
            apply_masks_([matrix], [codes])
    finish_from_matrix_(job.backend, matrix, job.operand, job.transpose)


def matrix_for(operand: Operand | None, shape: tuple[int, ...], source: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for the masked matrix ``[O, I]`` of a source: the operand's own, if that is what it holds."""
    if operand is not None and operand.tensors[0].shape == shape:
        return operand.tensors[0]
    return torch.empty(shape, dtype=dtype, device=source.device)


def finish_from_matrix_(backend: Backend, matrix: Tensor, operand: Operand | None, transpose: Operand | None) -> None:
    """Complete operands that the packer does not write."""
    if operand is not None:
        backend.finish_(operand, matrix)
    if transpose is not None:
        backend.finish_(transpose, matrix.t().contiguous())
