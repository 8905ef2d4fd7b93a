"""Least squares: kept weights whose outputs come closest to the dense ones, in blocks of neighbouring features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 2048
"""Input features of a block at most: memory and time of what is summed grow with it, errors of outputs fall."""

LEAST_DAMPING = 0.01
"""Of any block; see :func:`refitted`."""

CHUNK = 1 << 22
"""Numbers that are solved for at once, about."""


def gram_shape(features: int) -> tuple[int, int, int]:
    """Return the shape of what :func:`gram` returns: blocks, a block's width and one, and its width.

    Args:
        features: Of the input.

    Example:
        >>> gram_shape(384), gram_shape(3072)
        ((1, 385, 384), (2, 1537, 1536))
    """
    blocks = math.ceil(features / WIDTH)
    width = 4 * math.ceil(features / (4 * blocks))
    return blocks, width + 1, width


def gram(input: Tensor) -> Tensor:
    """Return the sums over tokens of the products of neighbouring features, and below them how many tokens there were.

    Args:
        input: ``[..., I]``, of any dtype.

    Returns:
        Float32 ``[blocks, width + 1, width]``: of every block ``XᵀX``, then a row of the number of tokens.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]))[0, (0, 1, 4), :2].tolist()
        [[10.0, 2.0], [2.0, 4.0], [2.0, 2.0]]
    """
    blocks, _, width = gram_shape(input.shape[-1])
    tokens = F.pad(input.reshape(-1, input.shape[-1]).float(), (0, blocks * width - input.shape[-1]))
    parts = tokens.view(-1, blocks, width).transpose(0, 1)
    with torch.autocast(input.device.type, enabled=False):
        products = parts.mT @ parts
    return torch.cat([products, products.new_full((blocks, 1, width), tokens.shape[0])], dim=1)


def refitted(weight: Tensor, mask: Tensor, grams: Tensor, damping: float | None = None) -> Tensor:
    """Return a weight whose kept entries make up for its pruned ones, which stay as they are.

    Of every row ``w``, the kept entries ``v`` of a block minimize ``‖X(w - v)‖² + δ·Σⱼ‖Xⱼ‖²(wⱼ - vⱼ)²``, with pruned
    ones at zero: ``A_KK · v_K = A_K · w``, where ``A = G + δ·diag(G)`` and ``G = XᵀX`` of the block's inputs.

    Args:
        weight: ``[O, I]``.
        mask: Bool ``[O, I]``, true where an entry is kept; any pattern.
        grams: What :func:`gram` returns for the inputs.
        damping: δ; None is a block's features per token, as few tokens say little, but at least 0.01.

    Returns:
        ``[O, I]`` in the weight's dtype. Blocks whose inputs are all zero stay as they are.

    Example:
        >>> inputs = torch.ones(3, 4)  # so features can stand in for each other
        >>> weight, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[False, False, True, True]])
        >>> refitted(weight, mask, gram(inputs), damping=1e-4)[0, 2:].sum()
        tensor(9.99...)

    Source: Frantar & Alistarh, "SparseGPT", ICML 2023, arXiv 2301.00774, eq. 2, solved exactly for a given mask.
    """
    rows, columns = weight.shape
    blocks, _, width = grams.shape
    pad = (0, blocks * width - columns)
    whole = F.pad(weight.float(), pad).view(rows, blocks, width)
    kept = F.pad(mask, pad).view(rows, blocks, width)
    most = int(kept.sum(-1).max())
    step = max(1, CHUNK // max(1, most * most))
    found = torch.empty_like(whole)
    for block, own in enumerate(grams):
        matrix = _damped(own, damping)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            found[part, block] = _solved(whole[part, block], kept[part, block], matrix, most)
    fitted = found.view(rows, -1)[:, :columns].to(weight.dtype)
    return torch.where(mask & fitted.isfinite(), fitted, weight)


def _damped(own: Tensor, damping: float | None) -> Tensor:
    """Return a block's ``G + δ·diag(G)``; features that were always zero are as if alone."""
    products, tokens = own[:-1], own[-1, 0]
    share = (len(products) / tokens).clamp_min(LEAST_DAMPING) if damping is None else damping
    squares = products.diagonal()
    return products + torch.diag(torch.where(squares > 0, share * squares, 1.0))


def _solved(weight: Tensor, kept: Tensor, matrix: Tensor, most: int) -> Tensor:
    """Return ``[rows, width]`` with the solution at kept entries, of which no row has more than ``most``."""
    order = torch.argsort(~kept, dim=-1, stable=True)[:, :most]  # kept ones first
    valid = kept.gather(1, order)
    both = valid[:, :, None] & valid[:, None, :]
    systems = torch.where(both, matrix[order[:, :, None], order[:, None, :]], 0)
    systems = systems + torch.diag_embed((~valid).to(systems))
    targets = torch.where(valid, (weight @ matrix).gather(1, order), 0)
    factors, _ = torch.linalg.cholesky_ex(systems)
    solution = torch.cholesky_solve(targets[..., None], factors)[..., 0]
    return weight.scatter(1, order, torch.where(valid, solution, weight.gather(1, order)))
