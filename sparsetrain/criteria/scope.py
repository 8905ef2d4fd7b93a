"""Which tiles stay dense when scores are compared over all layers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.tile_codes.reference import unpack_codes
from ..patterns import resolve_pattern
from ..tiles import require_tiles


@torch.no_grad()
def keep_dense_tiles(scores: Mapping[str, Tensor], budget: float, pattern: str = "transposable") -> dict[str, Tensor]:
    """Choose the tiles, over all layers, that masking would cost most, to keep them dense.

    A tile's loss is the sum of the scores that its mask prunes, divided by the layer's mean absolute score, so that
    layers of different scale compare. The ``round(budget · tiles)`` tiles of the largest loss are chosen; of equal
    losses, the earlier layer's and then the earlier tile's, row by row. Not a number counts as no loss.

    Args:
        scores: Layer name to scores ``[O, I]``, floating point; O and I multiples of 4.
        budget: The fraction of all tiles that stays dense, 0 to 1.
        pattern: What the mask of the other tiles looks like: a pattern's name.

    Returns:
        Layer name to bool ``[O/4, I/4]``, True where a tile stays dense, on the device of the scores.

    Raises:
        ValueError: If the budget or the pattern is not allowed, or a size is not a multiple of 4.

    Example:
        >>> scores = {"first": torch.eye(4), "second": torch.ones(4, 8)}
        >>> keep_dense_tiles(scores, budget=0.34)
        {'first': tensor([[False]]), 'second': tensor([[ True, False]])}

    Source: a dense or a 2:4 choice per tile is that of PATCH, arXiv 2509.23410, which learns it instead.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"budget is {budget!r}: it must be a fraction of the tiles, 0 to 1.")
    search = resolve_pattern(pattern).search
    for name, matrix in scores.items():
        require_tiles(f"scores of layer {name!r}", matrix.shape)
    if not scores:
        return {}
    losses = {name: _relative_losses(matrix, unpack_codes(search(matrix))) for name, matrix in scores.items()}
    device = next(iter(losses.values())).device
    flat = torch.cat([loss.flatten().to(device) for loss in losses.values()])
    order = flat.argsort(descending=True, stable=True)
    dense = torch.zeros_like(flat, dtype=torch.bool)
    dense[order[: round(budget * flat.numel())]] = True
    parts = torch.split(dense, [loss.numel() for loss in losses.values()])
    return {
        name: part.view(loss.shape).to(loss.device) for (name, loss), part in zip(losses.items(), parts, strict=True)
    }


def _relative_losses(scores: Tensor, mask: Tensor) -> Tensor:
    """Return what masking takes from every tile, float64 ``[O/4, I/4]``."""
    rows, columns = scores.shape
    exact = scores.double()
    pruned = exact.masked_fill(mask, 0).view(rows // 4, 4, columns // 4, 4).sum((1, 3))
    return (pruned / exact.abs().mean()).nan_to_num(nan=0.0)
