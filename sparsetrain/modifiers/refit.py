"""``Refit``: kept weights make up for pruned ones when masks come into force, by least squares over the layers' inputs.

What is gathered is the Gram matrices of the inputs of the last steps before: weights move, so earlier inputs say less.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checks.states import by_layer, require_part, tensor
from ..kernels.tile_codes import unpack_codes
from ..layers.masked_layer import MaskedLayer
from ..layers.selection.report import first_few
from ..masks.least_squares import gram, gram_shape, refitted
from .base import Entry, Modifier, Resumed, Run, Setup
from .inputs import InputHook
from .sums import summed

STEPS = 32
"""Whose inputs count: the last before masks come into force."""


class Refit(Modifier):
    """Gathers the inputs of layers whose masks are about to come into force, and re-fits their kept weights then.

    Convolutions larger than 1×1 are left alone, as the products of their inputs differ from position to position, and
    so are layers of whose input features each process sees but a part.

    Args:
        layers: Layer name to layer.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 4)
        >>> refit = Refit({"fc": layer})
        >>> refit.attach()
        >>> refit.open()
        >>> layer(torch.ones(2, 8)).sum().backward()
        >>> refit.passing("fc", torch.ones(1))[0, 0, :3]
        tensor([2., 2., 2.])

    Source: Frantar & Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774.
    """

    name = "refit"

    def __init__(self, layers: Mapping[str, MaskedLayer]) -> None:
        self.layers = {name: layer for name, layer in layers.items() if layer.matrix_shape[1] == layer.input_features}
        self.grams: dict[str, Tensor] = {}
        self._passing: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` if no step comes before the masks."""
        if setup.method.refit and setup.method.schedule.first_kind != "dense":
            raise ValueError(
                "refit is True but masks come into force before the first step, when no inputs were seen: give the "
                "schedule a dense head of some steps (warmup or prune_at), or set refit=False."
            )

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods with ``refit``."""
        return cls(run.layers) if run.method.refit else None

    def attach(self) -> None:
        """Hang on the layers; before the model is compiled."""
        self._name_cut()
        for name, layer in self.layers.items():
            layer.refits_soon = False
            self._handles.append(layer.register_forward_hook(InputHook(self, name), with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off the layers, and forget what was gathered."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._close()
        for layer in self.layers.values():
            layer.__dict__.pop("refits_soon", None)

    def gathers(self, layer: nn.Module) -> bool:
        """Return whether masks are about to come into force."""
        return bool(layer.refits_soon)

    def summarize(self, input: Tensor) -> Tensor:
        """Return the Gram matrices of an input."""
        return gram(input)

    def passing(self, name: str, summary: Tensor) -> Tensor:
        """Return the total of a layer's inputs since the last step."""
        return self._passing[name]

    def after_step(self, run: Run) -> None:
        """Count the inputs of a step, and begin when it is time."""
        names = [*self._passing]
        totals = [self._passing[name] for name in names]
        for name, total in zip(names, summed(totals, run.peers), strict=True):
            # an overflow in one batch must not spoil the others
            self.grams[name] += torch.where(total.isfinite().all(), total, torch.zeros_like(total))
            self._passing[name].zero_()
        self._look_ahead(run)

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Re-fit the layers whose masks come into force now."""
        if not entry.resumed:
            for name in sorted(entry.fresh & self._passing.keys()):
                self.refit_(name)
            self._close()
        self._look_ahead(run)

    @torch.no_grad()
    def refit_(self, name: str) -> None:
        """Write the re-fitted kept entries of a layer into its weight."""
        layer = self.layers[name]
        matrix = layer.matrix.detach()
        fitted = refitted(matrix, unpack_codes(layer.mask_codes), self.grams[name].to(matrix.device))
        layer.master.copy_(layer.as_weight(fitted))

    def open(self) -> None:
        """Begin to gather."""
        for name, layer in self._whole().items():
            layer.refits_soon = True
            shape = gram_shape(layer.input_features)
            self._passing[name] = layer.master.new_zeros(shape, dtype=torch.float32)
            found = self.grams.get(name)
            self.grams[name] = torch.zeros_like(self._passing[name]) if found is None else found.to(layer.master.device)

    def _close(self) -> None:
        self.grams.clear()
        self._passing.clear()
        for layer in self.layers.values():
            layer.refits_soon = False

    def _look_ahead(self, run: Run) -> None:
        """Begin to gather some steps before a phase with masks, unless that was done."""
        timeline = run.timeline
        ahead = [start for start in timeline.starts if start > run.clock and timeline.at(start)[0] != "dense"]
        if ahead and timeline.earliest and (early := timeline.earliest[run.phase_index]) is not None:
            ahead.append(early)
        comes = run.active < run.layers.keys() or len({*timeline.kept}) > 1  # some layer's mask, or another one
        if ahead and comes and min(ahead) - run.clock <= STEPS and not self._passing:
            self.open()

    def _whole(self) -> dict[str, MaskedLayer]:
        """Return the layers that see all of their inputs here."""
        return {name: layer for name, layer in self.layers.items() if layer.matrix.shape[1] == layer.input_features}

    def _name_cut(self) -> None:
        """Warn of the other layers."""
        if cut := [repr(name) for name in self.layers.keys() - self._whole().keys()]:
            warnings.warn(
                f"refit leaves layers {first_few(sorted(cut))} as masks leave them, because each process sees but a "
                "part of their input features.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Tensor] | None:
        """Return copies of what was gathered; None outside the steps before masks come into force."""
        return {name: value.cpu().clone() for name, value in self.grams.items()} or None

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged or of other layers; changes nothing."""
        shapes = {name: gram_shape(layer.input_features) for name, layer in self.layers.items()}
        rules = {name: tensor(torch.float32, shape, finite=True) for name, shape in shapes.items()}
        require_part(self.name, {} if state is None else state, by_layer(rules))

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Take back what :meth:`state_dict` returned."""
        self._close()
        self.grams.update({name: value.clone() for name, value in ({} if state is None else state).items()})
        if self.grams:
            self.open()
