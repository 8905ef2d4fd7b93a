"""``SoftScales``: β of every layer whose products see a soft-thresholded weight."""

from collections.abc import Collection, Mapping
from typing import Any, Self

import torch

from ..checks.rules import FINITE
from ..checks.states import by_layer, refuse, require_part
from ..layers.masked_layer import MaskedLayer
from ..layers.sharded.totals import sum_over_parts
from ..masks.soft_threshold import scale_of, soft_products
from ..types import PhaseKind
from .base import Entry, Modifier, Resumed, Run, Setup


class SoftScales(Modifier):
    """Measures β when a layer's mask comes into force and leaves it as it is, because a moving β makes masks flip.

    Args:
        layers: Layer name to layer, which holds its β.
        in_place: Whether frozen masks are written to the weights.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 4)
        >>> layer.set_codes_(torch.full((1, 2), 0x5A5A, dtype=torch.int16))
        >>> scales = SoftScales({"fc": layer})
        >>> scales.measure(["fc"])
        >>> scales.state_dict()["fc"] == float(layer.soft_scale)
        True

    Source: Hu, Zhu, Chen 2024, "S-STE", arXiv 2409.09099.
    """

    name = "soft_scales"

    def __init__(self, layers: Mapping[str, MaskedLayer], in_place: bool = False) -> None:
        self._layers, self._in_place = dict(layers), in_place

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods whose products see soft-thresholded weights."""
        return cls(run.layers, run.method.frozen_in_place) if run.method.forward == "soft" else None

    def leave_phase(self, run: Run, upcoming: PhaseKind, regroups: bool) -> None:
        """Have β measured again where masks will keep another number of every four."""
        if regroups:
            self.forget()

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Measure β of layers whose mask is in force; frozen in place, masks leave nothing that could shrink."""
        if run.phase != "frozen" or not self._in_place:
            self.measure(run.active)
        elif not entry.resumed:
            self.write_(run.active)
            self.forget()

    @torch.no_grad()
    def measure(self, names: Collection[str]) -> None:
        """Give these layers their β, if they have none."""
        layers = {name: self._layers[name] for name in names if self._layers[name].soft_scale is None}
        products = {
            name: soft_products(layer.matrix, layer.mask_codes, layer.execution.transposable)
            for name, layer in layers.items()
        }
        (sums,) = sum_over_parts(layers, products)
        for name, layer in layers.items():
            layer.soft_scale = scale_of(sums[name]).to(layer.master.dtype)

    def forget(self) -> None:
        """Have products see the hard-masked weight, or β measured again."""
        for layer in self._layers.values():
            layer.soft_scale = None

    @torch.no_grad()
    def write_(self, names: Collection[str]) -> None:
        """Write into the weights of these layers what their products see, before masks freeze in place."""
        for layer in (self._layers[name] for name in names):
            if layer.soft_scale is not None:
                layer.master.copy_(layer.effective_weight(layer.master))

    def state_dict(self) -> dict[str, float]:
        """Return every β that there is."""
        return {name: float(layer.soft_scale) for name, layer in self._layers.items() if layer.soft_scale is not None}

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged or of other layers; changes nothing."""
        state = {} if state is None else state
        require_part(self.name, state, by_layer(dict.fromkeys(self._layers, FINITE)))
        if resumed.same and not (resumed.phase == "frozen" and self._in_place):
            for name in resumed.active:
                if name not in state:
                    refuse(f"state['modifiers'][{self.name!r}] has no {name!r}")

    def load_state_dict(self, state: Mapping[str, float] | None) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name, layer in self._layers.items():
            scale = None if state is None else state.get(name)
            layer.soft_scale = None if scale is None else layer.master.new_tensor(scale)
