"""Wire jobs: wires of masked weights packed, or made dense, into the operands of backends."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.wire import from_wire_, pack_wires_now_
from .interface import Backend, Operand
from .packing import Targets, are_packed, finish_from_matrix_, matrix_for


@dataclass(eq=False)
class WireJob:
    """A backend's operands of one weight that are to be filled from its wire: W's, Wᵀ's or both.

    Args:
        values: Of the wire, ``[O, I/2]``, contiguous, in the dtype of the operands.
        numbers: uint8 ``[O/4, I/4]``, contiguous.
        backend: Whose operands they are.
        operand: W's, or None.
        transpose: Wᵀ's, or None.
    """

    values: Tensor
    numbers: Tensor
    backend: Backend
    operand: Operand | None = None
    transpose: Operand | None = None


def fill_from_wires_(jobs: Sequence[WireJob]) -> None:
    """Pack wires into operands, never through a dense weight where the packer writes them; layouts share a launch.

    Args:
        jobs: The operands get the bits that :func:`.packing.fill_` gives them for the masked weight and its codes.

    Raises:
        ValueError: If a wire is none, or does not fit its operands.
    """
    kinds: dict[tuple[object, ...], list[WireJob]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for job in jobs:
            if are_packed(job.operand, job.transpose):
                kind = (job.values.device, job.values.dtype, job.operand is None, job.transpose is None)
                kinds.setdefault(kind, []).append(job)
            else:
                _fill_from_matrix(job)
        for alike in kinds.values():
            _pack(alike)


def _pack(jobs: Sequence[WireJob]) -> None:
    targets = Targets([(job.operand, job.transpose) for job in jobs])
    kept, numbers = [job.values for job in jobs], [job.numbers for job in jobs]
    values, meta, values_t, meta_t = targets.columns
    pack_wires_now_(kept, numbers, values, meta, values_t, meta_t, targets.tables, targets.orders)
    for position, operand, natural in targets.unordered:
        jobs[position].backend.finish_(operand, natural)


def _fill_from_matrix(job: WireJob) -> None:
    rows, half = job.values.shape
    matrix = matrix_for(job.operand, (rows, 2 * half), job.values, job.values.dtype)
    from_wire_(job.values, job.numbers, matrix)
    finish_from_matrix_(job.backend, matrix, job.operand, job.transpose)
