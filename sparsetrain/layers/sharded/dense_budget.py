"""Which layers or tiles stay dense, chosen over parts that lie in many processes as over whole weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...distributed.selection import ordered_keys, threshold_of_largest
from ...distributed.shards import part_like
from ...masks.dense_budget import costliest, dense_layers, dense_tiles, tile_losses
from ..masked_layer import MaskedLayer
from .totals import counts_part, mesh_of, sum_over_mesh, sum_over_parts

Scores = Mapping[str, Tensor]
"""Layer name to scores ``[O, I]`` of the part that lies here."""

Codes = Mapping[str, Tensor]
"""Layer name to its tile codes."""


def score_sum(scores: Tensor) -> Tensor:
    """Return the sum of absolute scores, float64; what is not finite counts as zero.

    Example:
        >>> score_sum(torch.tensor([-2.0, float("nan"), 1.0])).item()
        3.0
    """
    return torch.where(scores.isfinite(), scores, 0).abs().sum(dtype=torch.float64)


def dense_layers_of(layers: Mapping[str, MaskedLayer], scores: Scores, codes: Codes, budget: float) -> list[str]:
    """Choose layers as :func:`sparsetrain.masks.dense_budget.dense_layers` does."""
    if mesh_of(layers) is None:
        return dense_layers(scores, codes, budget)
    losses = tile_losses(scores, codes, _means(layers, scores))
    (totals,) = sum_over_parts(layers, {name: loss.sum() for name, loss in losses.items()})
    sizes = {name: layers[name].weight.numel() for name in scores}
    return costliest({name: float(totals[name]) / (sizes[name] / 16) for name in scores}, sizes, budget)


def dense_tiles_of(layers: Mapping[str, MaskedLayer], scores: Scores, codes: Codes, budget: float) -> dict[str, Tensor]:
    """Choose tiles as :func:`sparsetrain.masks.dense_budget.dense_tiles` does; eight histograms are added up."""
    if mesh_of(layers) is None:
        return dense_tiles(scores, codes, budget)
    losses = tile_losses(scores, codes, _means(layers, scores))
    count = round(budget * sum(layers[name].weight.numel() // 16 for name in scores))
    if not count:
        return {name: torch.zeros_like(loss, dtype=torch.bool) for name, loss in losses.items()}
    keys = {name: ordered_keys(loss) for name, loss in losses.items()}
    least, equal = threshold_of_largest(_counted(layers, keys), count, lambda counts: sum_over_mesh(layers, counts))
    # of equal losses, those of earlier tiles
    places = _places(layers, keys)
    tied = {name: -places[name].masked_fill(keys[name] != least, torch.iinfo(torch.int64).max) for name in keys}
    last, _ = threshold_of_largest(_counted(layers, tied), equal, lambda counts: sum_over_mesh(layers, counts))
    return {name: (keys[name] > least) | (tied[name] >= last) for name in keys}


def _places(layers: Mapping[str, MaskedLayer], keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the number of every tile that lies here, among those of all layers."""
    found, first = {}, 0
    for name, own in keys.items():
        layer, (rows, columns) = layers[name], layers[name].matrix_shape
        whole = torch.arange(first, first + rows * columns // 16, device=own.device).view(rows // 4, columns // 4)
        whole = whole.t() if layer.transposed else whole
        part = whole if layer.shard is None else part_like(whole, layer.shard.weight)
        found[name] = part.t() if layer.transposed else part
        first += rows * columns // 16
    return found


def _counted(layers: Mapping[str, MaskedLayer], keys: Mapping[str, Tensor]) -> Tensor:
    """Return the keys that this process counts, flat: not those that another counts as well."""
    mesh = mesh_of(layers)
    own = [key.flatten() for name, key in keys.items() if counts_part(layers[name], mesh)]
    device = next(iter(keys.values())).device
    return torch.cat(own) if own else torch.empty(0, dtype=torch.int64, device=device)


def _means(layers: Mapping[str, MaskedLayer], scores: Scores) -> dict[str, Tensor]:
    (totals,) = sum_over_parts(layers, {name: matrix.double().abs().sum() for name, matrix in scores.items()})
    return {name: totals[name] / layers[name].weight.numel() for name in scores}
