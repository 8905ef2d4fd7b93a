"""Least squares: kept weights whose outputs come closest to the dense ones, in blocks of neighbouring features."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH = 2048
"""Input features of a block at most: memory and time of what is summed grow with it, errors of outputs fall."""

LEAST_DAMPING = 0.01
"""Of any block; see :func:`refitted`."""

MARGIN = 4
"""Rows and columns of a Gram matrix behind its features': one of a feature that is always one, then empty ones."""

CHUNK = 1 << 22
"""Numbers that are solved for at once, about."""


def gram_shape(features: int) -> tuple[int, int, int]:
    """Return the shape of what :func:`gram` returns: blocks, and a block's width with its margin twice.

    Args:
        features: Of the input.

    Example:
        >>> gram_shape(384), gram_shape(3072)
        ((1, 388, 388), (2, 1540, 1540))
    """
    blocks = math.ceil(features / WIDTH)
    side = 4 * math.ceil(features / (4 * blocks)) + MARGIN
    return blocks, side, side


def gram(input: Tensor) -> Tensor:
    """Return the sums over tokens of the products of neighbouring features, float32 ``[blocks, side, side]``.

    Args:
        input: ``[..., I]``, of any dtype.

    Returns:
        ``XᵀX`` of every block, behind whose features is one that is always one, so that it counts the tokens.

    Example:
        >>> found = gram(torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]))
        >>> found[0, :2, :2].tolist(), found[0, 4, 4].item()
        ([[10.0, 2.0], [2.0, 4.0]], 2.0)
    """
    blocks, side, _ = gram_shape(input.shape[-1])
    width = side - MARGIN
    tokens = F.pad(input.reshape(-1, input.shape[-1]).float(), (0, blocks * width - input.shape[-1]))
    parts = F.pad(tokens.view(-1, blocks, width), (0, 1), value=1.0)
    parts = F.pad(parts, (0, MARGIN - 1)).transpose(0, 1)
    with torch.autocast(input.device.type, enabled=False):
        return parts.mT @ parts


def refitted(weight: Tensor, mask: Tensor, grams: Tensor, damping: float | None = None) -> Tensor:
    """Return a weight whose kept entries make up for its pruned ones, which stay as they are.

    Of every row ``w``, the kept entries ``v`` of a block minimize ``‖X(w - v)‖² + δ·Σⱼ‖Xⱼ‖²(wⱼ - vⱼ)²``, with pruned
    ones at zero: ``A_KK · v_K = A_K · w``, where ``A = G + δ·diag(G)`` and ``G = XᵀX`` of the block's inputs.

    Args:
        weight: ``[O, I]``.
        mask: Bool ``[O, I]``, true where an entry is kept; any pattern.
        grams: What :func:`gram` returns for the inputs, ``[blocks, side, side]``.
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
    blocks, width = grams.shape[0], grams.shape[1] - MARGIN
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
    width = own.shape[0] - MARGIN
    squares, count = own.diagonal()[:width], own[width, width]
    if damping is None:
        share = torch.where(count > 0, width / count, 0).clamp_min(LEAST_DAMPING)
    else:
        share = torch.full_like(count, damping)
    return own[:width, :width] + torch.diag(torch.where(squares > 0, share * squares, 1.0))


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
