"""Sums of magnitudes and flips of many layers' weights under their masks, in one launch a device."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.statistics.operator import tile_statistics
from ..layers.masked_layer import MaskedLayer
from ..layers.sharded.totals import sum_over_parts
from ..masks.matrices import by_device

Layers = Mapping[str, MaskedLayer]


def layer_statistics(layers: Layers, previous: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """Return the six numbers of ``tile_statistics`` for every layer, float64 on its device.

    Args:
        layers: By name.
        previous: Tile codes of all of them from which flips are counted; empty for none.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer_statistics({"fc": SparseLinear(8, 4)})["fc"].shape
        torch.Size([6])
    """
    found: dict[str, Tensor] = {}
    for names in by_device({name: layer.master for name, layer in layers.items()}):
        own = [layers[name] for name in names]
        rows = tile_statistics(
            [layer.matrix.detach() for layer in own],
            [layer.mask_codes for layer in own],
            [previous[name] for name in names] if previous else [],
        )
        found.update(zip(names, rows, strict=True))
    return {name: found[name] for name in layers}


def magnitude_sums(layers: Layers) -> dict[str, Tensor]:
    """Return the five sums of :func:`sparsetrain.masks.metrics.magnitude_sums` for every layer."""
    return {name: row[:5] for name, row in layer_statistics(layers).items()}


def rate_of(flips: Mapping[str, Tensor], layers: Layers, only: str | None = None) -> float | None:
    """Return flips as a fraction of the entries, of one layer or of all that have some; None if none has."""
    if not flips:
        return None
    names = list(flips) if only is None else [only]
    entries = sum(layers[name].weight.numel() for name in names)
    return float(torch.stack([flips[name].cpu() for name in names]).sum()) / entries


def kept_fractions(layers: Layers) -> dict[str, float]:
    """Return ``Σ|W⊙M| / Σ|W|`` of every layer, from one transfer."""
    (rows,) = sum_over_parts(layers, magnitude_sums(layers))
    values = torch.stack([row.cpu() for row in rows.values()]).tolist()
    return {name: kept / (kept + pruned or 1.0) for name, (kept, pruned, *_) in zip(rows, values, strict=True)}
