"""``SoftScales``: β of every layer whose products see a soft-thresholded weight."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..checks import FINITE
from ..masked_layer import MaskedLayer
from ..soft_threshold import soft_scale
from ..state_schema import by_layer, require_state


class SoftScales:
    """Measures β when a layer's mask comes into force and leaves it as it is, because a moving β makes masks flip.

    Args:
        layers: Layer name to layer, which holds its β.

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

    def __init__(self, layers: Mapping[str, MaskedLayer]) -> None:
        self._layers = dict(layers)

    @torch.no_grad()
    def measure(self, names: Collection[str]) -> None:
        """Give these layers their β, if they have none."""
        for layer in (self._layers[name] for name in names):
            if layer.soft_scale is None:
                layer.soft_scale = soft_scale(layer.matrix, layer.mask_codes, layer.execution.transposable)

    def forget(self) -> None:
        """Have products see the hard-masked weight, or β measured anew."""
        for layer in self._layers.values():
            layer.soft_scale = None

    @torch.no_grad()
    def write_(self, names: Collection[str]) -> None:
        """Write into the weights of these layers what their products see, before masks freeze in place."""
        for layer in (self._layers[name] for name in names):
            if layer.soft_scale is not None:
                layer.weight.copy_(layer.effective_weight(layer.weight))

    def state_dict(self) -> dict[str, float]:
        """Return every β that there is."""
        return {name: float(layer.soft_scale) for name, layer in self._layers.items() if layer.soft_scale is not None}

    def check_state_dict(self, state: Any) -> None:
        """Raise ``ValueError`` if a state is damaged or of other layers; changes nothing."""
        require_state("soft_scales", state, by_layer(dict.fromkeys(self._layers, FINITE)))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what :meth:`state_dict` returned."""
        for name, layer in self._layers.items():
            scale = state.get(name)
            layer.soft_scale = None if scale is None else layer.weight.new_tensor(scale)
