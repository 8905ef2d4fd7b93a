"""``Renewal``: the packed weights of several layers, filled again together after every step of an optimizer."""

import logging
import weakref
from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import TypeAlias

import torch
from torch import Tensor

from ..backends.packing import Batches, PackJob, fill_
from ..kernels.launch import Known
from ..kernels.torch_internals import storage_address
from .operands import Layer, Operands
from .tensor_state import stamp_of_sources

LOG = logging.getLogger("sparsetrain")

LOOK = 4
"""Renewals after which it is looked whether an operand was used."""

_OPERANDS, _CODES, _BACKWARD = attrgetter("operands"), attrgetter("mask_codes"), attrgetter("backward_codes")
_VERSION, _IS_IDLE = attrgetter("_version"), attrgetter("is_idle")

Source: TypeAlias = tuple[Operands, Tensor, Tensor, Tensor | None]
"""Operands, and the matrix, the codes and the backward codes that they are filled from."""

Places: TypeAlias = tuple[list[int], list[int]]


class Renewal:
    """Fills the operands of several layers, in place, but for those just written; equal layouts share a launch.

    What it finds out of the layers it looks for only once, until :attr:`Operands.generation` tells of a change.

    Args:
        layers: Whose operands are filled.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 4)
        >>> Renewal([layer]).repack_()
        >>> layer.operands.is_packed  # nothing asked for any yet
        False
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = list(layers)
        self._operands: list[Operands] = list(map(_OPERANDS, self._layers))
        self._turn = 0
        self._seen = -1  # the generation in which the rest was found out
        self._matrices: Sequence[Tensor] = ()
        self._codes: Sequence[Tensor] = ()
        self._sources: list[Source] = []  # of the operands that are filled
        self._batches: weakref.ref[Batches] | None = None  # who releases operands frees them at once
        self._with_biases: Sequence[Layer] = ()
        self._places: Places = [], []  # of the matrices
        self._places_of_codes: Places = [], []
        self._known_places: Hashable = None

    def repack_(
        self,
        matrices: Sequence[Tensor] | None = None,
        codes: Sequence[Tensor] | None = None,
        known: Known | None = None,
    ) -> None:
        """Fill what there is.

        Args:
            matrices: Of the layers, where they are at hand: the same list as long as they are the same tensors.
            codes: Of the layers, with the matrices; just so.
            known: Of both.
        """
        self._turn += 1
        again = matrices is not None and self._matrices is matrices and self._codes is codes and self._is_current()
        batches = self._batches() if again and self._batches is not None else None
        again = batches is not None and known is not None
        try:
            if batches is not None and known is not None:
                batches.fill_(known)
            else:
                jobs = self._look(matrices, codes)
                fill_(jobs)
                self._batches = _batches_of(jobs)
        except RuntimeError as error:
            lenient = all(operands.may_fall_back for operands, *_ in self._sources)
            if not lenient or isinstance(error, torch.OutOfMemoryError):
                Operands.invalidate_all(self._operands)
                raise
            LOG.warning("weights cannot be packed now, so the next products pack theirs or are dense: %s", error)
            for operands, *_ in self._sources:
                operands.release()
        else:
            self._take_note(again, known)
        for layer in self._with_biases:
            if layer.bias is not None:
                layer.operands.renew_bias_(layer.bias)

    def _is_current(self) -> bool:
        """Say whether all are to be filled, as in the last renewal."""
        idle = self._turn % LOOK == 0 and any(map(_IS_IDLE, self._operands))
        return self._seen == Operands.generation and not idle

    def _look(self, matrices: Sequence[Tensor] | None, codes: Sequence[Tensor] | None) -> Sequence[PackJob]:
        """Return what is to be filled now, and keep what the next renewals need."""
        given = matrices is not None and codes is not None
        if matrices is None:
            with torch.no_grad():
                matrices = [layer.matrix for layer in self._layers]
        self._matrices, self._codes = matrices, list(map(_CODES, self._layers)) if codes is None else codes
        self._with_biases = [layer for layer in self._layers if layer.operands.biases]
        every: list[Source] = [*zip(self._operands, matrices, self._codes, map(_BACKWARD, self._layers), strict=True)]
        self._sources = [source for source in every if not source[0].take_fresh(*source[1:])]
        jobs: list[PackJob] = []
        for operands, matrix, code, again in self._sources:
            jobs += operands.to_fill(matrix, code, again)
        plain = not any(
            again is not None or matrix.is_inference() or code.is_inference() for _, matrix, code, again in every
        )
        stays = given and plain and len(self._sources) == len(every)
        self._seen = Operands.generation if stays else -1
        return jobs

    def _take_note(self, again: bool, known: Known | None) -> None:
        """Tell the operands of which state of their sources they are."""
        if self._seen < 0:
            for operands, matrix, code, backward in self._sources:
                operands.renewed(stamp_of_sources(matrix, code, backward), matrix, code, backward)
            return
        weights, codes = self._matrices, self._codes
        stay = again and known is not None and known.places == self._known_places
        if not stay:
            self._places, self._places_of_codes = _places(weights), _places(codes)
            self._known_places = None if known is None else known.places
        places = *self._places, map(_VERSION, weights), *self._places_of_codes, map(_VERSION, codes)
        stamps = zip(*places, strict=True)
        if stay:
            Operands.renewed_again(self._operands, stamps)
            return
        for (operands, matrix, code, _), stamp in zip(self._sources, stamps, strict=True):
            operands.renewed(stamp, matrix, code)


def _batches_of(jobs: Sequence[PackJob]) -> "weakref.ref[Batches] | None":
    batches = jobs[0].batches if jobs else None
    return weakref.ref(batches) if batches is not None and batches.stay else None


def _places(tensors: Sequence[Tensor]) -> Places:
    """Return the storages of tensors, and where in them they begin."""
    return list(map(storage_address, tensors)), list(map(int, map(Tensor.storage_offset, tensors)))
