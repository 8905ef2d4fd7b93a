"""Which layers or tiles stay dense when scores are compared over the whole model: where masks would cost most.

The loss of a tile is the sum of the scores that its mask prunes, over the layer's mean absolute score, so that layers
of different scale compare. Not a number counts as no loss.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..checks.rules import instance, number, require
from ..checks.tensors import require_floating
from ..kernels.tile_codes import unpack_codes
from .patterns import resolve_pattern
from .tile_codes import require_tiles


@torch.no_grad()
def keep_dense_tiles(scores: Mapping[str, Tensor], budget: float, pattern: str = "transposable") -> dict[str, Tensor]:
    """Choose the tiles, over all layers, that masking would cost most, to keep them dense.

    The ``round(budget · tiles)`` tiles of the largest loss are chosen; of equal losses, the earlier layer's and then
    the earlier tile's, row by row.

    Args:
        scores: Layer name to scores ``[O, I]``, floating point; O and I multiples of 4.
        budget: The fraction of all tiles that stays dense, 0 to 1.
        pattern: What the mask of the other tiles looks like: a pattern's name.

    Returns:
        Layer name to bool ``[O/4, I/4]``, True where a tile stays dense, on the device of the scores.

    Raises:
        TypeError: If scores are no dense floating-point tensors.
        ValueError: If the budget or the pattern is not allowed, or a size is not a multiple of 4.

    Example:
        >>> scores = {"first": torch.eye(4), "second": torch.ones(4, 8)}
        >>> keep_dense_tiles(scores, budget=0.34)
        {'first': tensor([[False]]), 'second': tensor([[ True, False]])}

    Source: a dense or a 2:4 choice per tile is that of PATCH, arXiv 2509.23410, which learns it instead.
    """
    return dense_tiles(scores, _search(scores, budget, pattern), budget)


@torch.no_grad()
def keep_dense_layers(scores: Mapping[str, Tensor], budget: float, pattern: str = "transposable") -> list[str]:
    """Choose the layers that masking would cost most, to keep them dense.

    Layers are taken by their mean loss of a tile, largest first, each if it still fits into the budget; of equal
    losses, the earlier one first.

    Args:
        scores: Layer name to scores ``[O, I]``, floating point; O and I multiples of 4.
        budget: The fraction of all weights that may stay dense, 0 to 1.
        pattern: What the mask of the other layers looks like: a pattern's name.

    Returns:
        Their names, in the order of ``scores``.

    Raises:
        TypeError: If scores are no dense floating-point tensors.
        ValueError: If the budget or the pattern is not allowed, or a size is not a multiple of 4.

    Example:
        >>> keep_dense_layers({"first": torch.eye(4), "second": torch.ones(4, 4)}, budget=0.5)
        ['second']
    """
    return dense_layers(scores, _search(scores, budget, pattern), budget)


def dense_tiles(scores: Mapping[str, Tensor], codes: Mapping[str, Tensor], budget: float) -> dict[str, Tensor]:
    """Choose as :func:`keep_dense_tiles` does, for masks that are given.

    Args:
        scores: Layer name to scores ``[O, I]``.
        codes: Layer name to int16 tile codes ``[O/4, I/4]``.
        budget: The fraction of all tiles that stays dense.

    Example:
        >>> codes = {"fc": torch.tensor([[-1, 0x3C3C]], dtype=torch.int16)}  # the first prunes nothing
        >>> dense_tiles({"fc": torch.ones(4, 8)}, codes, budget=0.5)
        {'fc': tensor([[False,  True]])}
    """
    if not scores:
        return {}
    losses = tile_losses(scores, codes)
    device = next(iter(losses.values())).device
    flat = torch.cat([loss.flatten().to(device) for loss in losses.values()])
    order = flat.argsort(descending=True, stable=True)
    dense = torch.zeros_like(flat, dtype=torch.bool)
    dense[order[: round(budget * flat.numel())]] = True
    parts = torch.split(dense, [loss.numel() for loss in losses.values()])
    return {
        name: part.view(loss.shape).to(loss.device) for (name, loss), part in zip(losses.items(), parts, strict=True)
    }


def dense_layers(scores: Mapping[str, Tensor], codes: Mapping[str, Tensor], budget: float) -> list[str]:
    """Choose as :func:`keep_dense_layers` does, for masks that are given.

    Args:
        scores: Layer name to scores ``[O, I]``.
        codes: Layer name to int16 tile codes ``[O/4, I/4]``.
        budget: The fraction of all weights that may stay dense.

    Example:
        >>> codes = {"a": torch.tensor([[-1]]), "b": torch.tensor([[0x3C3C]])}  # the first prunes nothing
        >>> codes = {name: code.to(torch.int16) for name, code in codes.items()}
        >>> dense_layers({"a": torch.ones(4, 4), "b": torch.ones(4, 4)}, codes, budget=0.5)
        ['b']
    """
    means = {name: float(loss.mean()) for name, loss in tile_losses(scores, codes).items()}
    return costliest(means, {name: matrix.numel() for name, matrix in scores.items()}, budget)


def costliest(losses: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> list[str]:
    """Choose layers by their mean loss of a tile.

    Args:
        losses: Layer name to that.
        sizes: Layer name to its number of weights.
        budget: The fraction of all weights that stays dense.

    Example:
        >>> costliest({"a": 0.1, "b": 0.3, "c": 0.2}, {"a": 16, "b": 16, "c": 32}, budget=0.5)
        ['a', 'b']
    """
    left, chosen = budget * sum(sizes.values()), set()
    for name in sorted(losses, key=lambda name: -losses[name]):
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return [name for name in losses if name in chosen]


def _search(scores: Mapping[str, Tensor], budget: float, pattern: str) -> dict[str, Tensor]:
    require("scores", scores, instance(Mapping, "a dict of layer name to scores"))
    require("budget", budget, number("a fraction of the tiles or weights, 0 to 1", lambda value: 0 <= value <= 1))
    search = resolve_pattern(pattern).search
    for name, matrix in scores.items():
        require_floating(f"scores of layer {name!r}", matrix)
        require_tiles(f"scores of layer {name!r}", matrix.shape)
    return {name: search(matrix, 2) for name, matrix in scores.items()}


def tile_losses(
    scores: Mapping[str, Tensor], codes: Mapping[str, Tensor], means: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return what masking takes from every tile, float64 ``[O/4, I/4]``.

    Args:
        scores: Layer name to scores ``[O, I]``, or those of the part that lies here.
        codes: Layer name to int16 tile codes ``[O/4, I/4]``.
        means: Layer name to the mean absolute score of the whole layer; None to take those of the scores.

    Example:
        >>> tile_losses({"fc": torch.ones(4, 4)}, {"fc": torch.full((1, 1), 0x3C3C, dtype=torch.int16)})["fc"].item()
        8.0
    """
    found = {}
    for name, matrix in scores.items():
        exact = matrix.double()
        rows, columns = codes[name].shape
        pruned = exact.masked_fill(unpack_codes(codes[name]), 0).view(rows, 4, columns, 4).sum((1, 3))
        mean = exact.abs().mean() if means is None else means[name]
        found[name] = (pruned / mean).nan_to_num(nan=0.0)
    return found
