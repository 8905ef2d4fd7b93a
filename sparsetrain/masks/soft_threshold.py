"""Soft-thresholded weights: what is kept shrinks by what is pruned beside it, so that the forward is continuous."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.tile_codes import unpack_codes


def soft_thresholded(weight: Tensor, codes: Tensor, transposable: bool = False) -> Tensor:
    """Return ``sign(w)·max(|w| - t, 0)`` on kept entries, 0 elsewhere.

    The threshold t of an entry is the largest pruned magnitude of its four along the row; if ``transposable``, also of
    its four along the column. An entry is zero when it changes places with a pruned one.

    Args:
        weight: ``[O, I]``, floating point.
        codes: int16 ``[O/4, I/4]``.
        transposable: Whether two of four are kept along columns too.

    Example:
        >>> codes = torch.full((1, 1), 0x5A5A, dtype=torch.int16)  # keeps columns 1 and 3, then 0 and 2
        >>> soft_thresholded(torch.tensor([[1.0, 3.0, 2.0, -4.0]] * 4), codes)[0].tolist()
        [0.0, 1.0, 0.0, -2.0]

    Source: Hu, Zhu, Chen 2024, "S-STE", arXiv 2409.09099; the transposable form is our extension.
    """
    rows, columns = weight.shape
    mask = unpack_codes(codes)
    magnitude = weight.abs()
    pruned = magnitude.masked_fill(mask, 0)
    threshold = pruned.view(rows, columns // 4, 4).amax(2, keepdim=True).expand(-1, -1, 4).reshape(rows, columns)
    if transposable:
        fours = pruned.view(rows // 4, 4, columns).amax(1, keepdim=True).expand(-1, 4, -1).reshape(rows, columns)
        threshold = torch.maximum(threshold, fours)
    return ((magnitude - threshold).clamp(min=0) * weight.sign()).masked_fill(~mask, 0)


def soft_products(weight: Tensor, codes: Tensor, transposable: bool = False) -> Tensor:
    """Return ``⟨W, S⟩`` and ``⟨S, S⟩``, float64 ``[2]``, of a weight W, or of a part of one, and S left of it.

    Example:
        >>> codes = torch.full((1, 1), 0x5A5A, dtype=torch.int16)
        >>> soft_products(torch.tensor([[1.0, 3.0, 2.0, -4.0], [3.0, 1.0, 4.0, 2.0]] * 2), codes).tolist()
        [44.0, 20.0]
    """
    soft = soft_thresholded(weight, codes, transposable)
    return torch.stack([(weight * soft).sum(dtype=torch.float64), soft.square().sum(dtype=torch.float64)])


def scale_of(products: Tensor) -> Tensor:
    """Return β, the scalar that brings S nearest to W, ``⟨W, S⟩ / ⟨S, S⟩``; 1 where nothing is left.

    Args:
        products: What :func:`soft_products` returned, or a sum of that over the parts of a weight.

    Example:
        >>> scale_of(torch.tensor([44.0, 20.0])).item(), scale_of(torch.zeros(2)).item()
        (2.200000047683716, 1.0)

    Source: the same; it is computed once, at the first sparse step, because a moving β makes masks flip.
    """
    return torch.where(products[1] > 0, products[0] / products[1], 1.0)


class SoftThreshold(torch.autograd.Function):
    """``β·S(W)`` forward; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, codes: Tensor, scale: Tensor, transposable: bool) -> Tensor:
        """Return the weight that the products see."""
        return soft_thresholded(weight, codes, transposable) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient as it comes."""
        return gradients[0], None, None, None
