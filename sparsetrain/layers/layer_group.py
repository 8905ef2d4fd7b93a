"""What a run does to many sparse layers together: masks on weights, packed weights, numbers of random draws."""

import itertools
import time
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_

import torch
from torch import Tensor

from ..kernels.launch import Known, are_plain
from ..kernels.masked_update.operator import add_masked_decays_now_, apply_masks_now_
from ..kernels.plan import strides_of
from ..masks.matrices import by_device
from ..matmul.estimated_weight_gradient import renumber_
from ..matmul.operands import Operands
from ..matmul.renewal import Renewal
from .masked_layer import MaskedLayer, weight_in, written_as_matrices

KEPT = 8
"""Choices of layers whose groups are kept."""

_CODES, _DTYPE = attrgetter("mask_codes"), attrgetter("dtype")


class LayerGroup:
    """Layers on one device, and what kernels that take them all need of them, in lists.

    Args:
        layers: Name to layer.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> group = LayerGroup({"fc": SparseLinear(8, 4)})
        >>> [tuple(weight.shape) for weight in group.weights], group.is_current()
        ([(4, 8)], True)
    """

    def __init__(self, layers: Mapping[str, MaskedLayer]) -> None:
        self.layers = dict(layers)
        self.each = [*self.layers.values()]
        self._parameters = [layer._parameters for layer in self.each]
        self.weights = list(map(weight_in, self.each))
        self.is_spread = any(layer.shard is not None for layer in self.each)
        self.parameters = [layer.parameter for layer in self.each] if self.is_spread else self.weights
        """What optimizers know of the weights, which are parts of them where they are spread over processes."""
        self.codes = list(map(_CODES, self.each))
        self.numbers = tuple(zlib.crc32(name.encode()) for name in layers)
        """Of the layers, for random draws."""
        self._layouts: Hashable = None
        self._places: Hashable = None
        self._moment: object = None
        self._known = Known(0, 0)
        self._parts: dict[tuple[int, ...], list[LayerGroup]] = {}
        self._are_matrices = all(weight.dim() == 2 for weight in self.weights) and not any(
            layer.transposed for layer in self.each
        )
        self._are_plain = are_plain(self.weights, self.codes)

    def is_current(self) -> bool:
        """Say whether the layers still have these weights and codes."""
        # nn.Module would find a weight in half a microsecond or more
        weights: list[Tensor | None] = [parameters.get("weight") for parameters in self._parameters]
        if self.is_spread or any(layer.shard is not None for layer in self.each):
            weights = list(map(weight_in, self.each))
        return all(map(is_, self.weights, weights)) and all(map(is_, self.codes, map(_CODES, self.each)))

    def known(self, moment: object = None) -> Known | None:
        """Return what tells where weights and codes lie, and how; None where every call has to look.

        It has to if matrices are made of the weights each time, or a weight is of a class of its own. A weight may be
        given other data without a trace, so its address, strides and dtype are looked at.

        Args:
            moment: Who gives the same object again knows that nobody did so since.
        """
        if not self._are_matrices or not self._are_plain:
            return None
        if moment is not None and moment is self._moment:
            return self._known
        self._moment = moment
        places = tuple(map(Tensor.data_ptr, self.weights))
        layouts = strides_of(self.weights), tuple(map(_DTYPE, self.weights))
        if places != self._places or layouts != self._layouts:
            number = next(_NUMBERS)
            self._known = Known(self._known.layouts if layouts == self._layouts else number, number, kept={})
            self._places, self._layouts = places, layouts
        return self._known

    @property
    def matrices(self) -> list[Tensor]:
        """The weights as matrices ``[O, K]``, to read."""
        if self._are_matrices:
            return self.weights
        with torch.no_grad():
            return [layer.matrix for layer in self.each]

    @contextmanager
    def written(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Give tensors that are shaped like the weights as matrices to write to, without a graph."""
        with torch.no_grad():
            if self._are_matrices:
                yield tensors
                return
            with written_as_matrices(self.each, tensors) as matrices:
                yield matrices

    def apply_masks_(self, tensors: Sequence[Tensor], moment: object = None) -> None:
        """Write zeros into what the masks prune.

        Args:
            tensors: Gradients, or the weights themselves.
            moment: As in :meth:`known`.
        """
        with self.written(tensors) as matrices:
            apply_masks_now_(matrices, self.codes, self._known_but(tensors, moment))

    def decay_(self, tensors: Sequence[Tensor], decay: Tensor, clock: int) -> None:
        """Add what the masks prune of the weights, times a factor, to tensors that are shaped like them.

        Args:
            tensors: Gradients, or the weights themselves.
            decay: The factor, one element on the device.
            clock: Steps since the run began; with a layer's number, it makes the random numbers of 16-bit sums.
        """
        with self.written(tensors) as matrices:
            weights = matrices if tensors is self.weights else self.matrices
            add_masked_decays_now_(matrices, weights, self.codes, decay, self.numbers, clock, self._known_but(tensors))

    def _known_but(self, targets: Sequence[Tensor], moment: object = None) -> Known | None:
        known = self.known(moment)
        return known if known is None or targets is self.weights else known._replace(moving=1)

    def split(self, keys: Sequence[Hashable]) -> list["LayerGroup"]:
        """Return the parts whose keys are equal, given one for each layer; the group itself if all are."""
        numbers: dict[Hashable, int] = {}
        pattern = tuple([numbers.setdefault(key, len(numbers)) for key in keys])
        if len(numbers) == 1:
            return [self]
        if pattern not in self._parts:
            parts: list[dict[str, MaskedLayer]] = [{} for _ in numbers]
            for number, (name, layer) in zip(pattern, self.layers.items(), strict=True):
                parts[number][name] = layer
            self._parts = {pattern: list(map(LayerGroup, parts))}
        return self._parts[pattern]

    def repack_(self, renewal: Renewal, moment: object = None) -> None:
        """Renew the packed weights by the renewal of these layers."""
        if self._are_matrices:
            renewal.repack_(self.weights, self.codes, self.known(moment))
        else:
            renewal.repack_()


class LayerGroups:
    """Groups of a run's layers by device, kept from step to step until a weight or a mask is another tensor.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layers, groups = {"fc": SparseLinear(8, 4)}, LayerGroups()
        >>> groups.of(layers)[0] is groups.of(layers)[0]
        True
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], tuple[list[MaskedLayer], list[LayerGroup], int]] = {}
        self._packed: list[tuple[LayerGroup, Renewal]] = []
        self._seen = -1  # the generation of operands in which those were found
        self._draws: list[tuple[Tensor, int]] = []  # of layers, with the layers' numbers
        self._drawn = -1  # the generation in which those were found
        self._chosen: tuple[Mapping[str, MaskedLayer], frozenset[str], Mapping[str, MaskedLayer]]
        self._chosen = {}, frozenset(), {}
        self._left: tuple[Mapping[str, MaskedLayer], tuple[int, bool], list[Operands]]  # what no repacking renews
        self._left = {}, (-1, False), []

    def of(self, layers: Mapping[str, MaskedLayer]) -> list[LayerGroup]:
        """Return the groups of some layers, given by name.

        What is kept is looked at when :attr:`Operands.generation` tells of a change, as a weight that was replaced does
        where ``nn.Module`` is told of it; who replaces one elsewhere calls :meth:`forget`.
        """
        names, each = tuple(layers), [*layers.values()]
        kept, groups, seen = self._kept.get(names, ([], [], -1))
        if len(kept) != len(each) or not all(map(is_, kept, each)):
            seen = -1
        if seen != Operands.generation:
            if seen < 0 or not all(map(LayerGroup.is_current, groups)):
                weights = {name: weight_in(layer) for name, layer in layers.items()}
                groups = [LayerGroup({name: layers[name] for name in together}) for together in by_device(weights)]
            while len(self._kept) >= KEPT and names not in self._kept:
                del self._kept[next(iter(self._kept))]
            self._kept[names] = each, groups, Operands.generation
        return groups

    def chosen(self, layers: Mapping[str, MaskedLayer], names: frozenset[str]) -> Mapping[str, MaskedLayer]:
        """Return the layers that have these names."""
        whose, which, chosen = self._chosen
        if whose is not layers or which != names:
            chosen = {name: layer for name, layer in layers.items() if name in names}
            self._chosen = layers, names, chosen
        return chosen

    def invalidate(self, layers: Mapping[str, MaskedLayer], *, repacks: bool) -> None:
        """Have operands renewed before their next use, as an optimizer has written to their weights.

        Args:
            layers: Whose weights; the same mapping as long as they are the same.
            repacks: Whether :meth:`repack_` comes before any use, so that those that it renews can be left.
        """
        now = Operands.generation, repacks and self._seen == Operands.generation
        whose, then, left = self._left
        if whose is not layers or then != now:
            renewed = {id(layer) for group, _ in self._packed for layer in group.each} if now[1] else set()
            left = [layer.operands for layer in layers.values() if id(layer) not in renewed]
            self._left = layers, now, left
        Operands.invalidate_all(left)

    def forget(self) -> None:
        """Look for everything again, and hold nothing of what is packed."""
        self._chosen, self._left = ({}, frozenset(), {}), ({}, (-1, False), [])
        self._kept, self._packed, self._seen = {}, [], -1
        self._draws, self._drawn = [], -1

    def repack_(self, layers: Mapping[str, MaskedLayer], moment: object = None) -> float:
        """Renew packed weights now, so that captured graphs and compiled steps find them.

        Args:
            layers: All of the run; those that have none, and those with a soft threshold, are passed over.
            moment: As in :meth:`LayerGroup.known`.

        Returns:
            Milliseconds of host time.
        """
        start = time.perf_counter()
        if self._seen != Operands.generation:
            own = {
                name: layer for name, layer in layers.items() if layer.soft_scale is None and layer.operands.is_packed
            }
            self._packed = [(group, Renewal(group.each)) for group in self.of(own)]
            Operands.invalidate_all([layer.operands for name, layer in layers.items() if name not in own])
        for group, renewal in self._packed:
            group.repack_(renewal, moment)
        self._seen = Operands.generation
        return 1e3 * (time.perf_counter() - start)

    def number_draws_(self, layers: Mapping[str, MaskedLayer], clock: int) -> None:
        """Have every layer's random estimates depend on the clock, so that there is nothing to save of them.

        Args:
            layers: All of the run.
            clock: Steps since the run began.
        """
        if self._drawn != Operands.generation:
            own = enumerate(layers.values())
            self._draws = [(layer.draws, number) for number, layer in own if layer.draws is not None]
            self._drawn = Operands.generation
        for draws, number in self._draws:
            renumber_(draws, number, clock)


_NUMBERS = itertools.count(1)
