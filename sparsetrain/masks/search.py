"""Masks from scores: transposable n:4 (exact) and row-wise N:M, and the predicates that check them."""

from typing import Any

import torch
from torch import Tensor

from ..checks.tensors import require_dtype, require_floating
from ..kernels.mask_search import search_permutations, search_row_wise, search_tiles, search_tiles_with_mask
from ..kernels.tile_codes import unpack_codes
from .tile_codes import require_tiles


def transposable_codes(scores: Tensor, n: int = 2) -> Tensor:
    """Return the tile codes of :func:`transposable_mask`.

    Args:
        scores: ``[..., O, I]``, any floating dtype; O and I multiples of 4.
        n: Entries kept of every row and column of a tile: 1, 2 or 3.

    Returns:
        int16 ``[..., O/4, I/4]``.

    Raises:
        TypeError: If the scores are no dense floating-point tensor.
        ValueError: If O or I is not a multiple of 4, or n is not allowed.

    Example:
        >>> import torch
        >>> transposable_codes(torch.rand(8, 16)).shape
        torch.Size([2, 4])
    """
    _require_kept(n)
    matrix = _as_matrix(scores)
    codes: Tensor = search_tiles(matrix) if n == 2 else search_permutations(matrix, n)
    return codes.view(*scores.shape[:-2], scores.shape[-2] // 4, scores.shape[-1] // 4)


def transposable_mask(scores: Tensor, n: int = 2) -> Tensor:
    """Return the transposable n:4 mask that keeps the largest sum of scores: exact, per 4×4 tile.

    Exactly n entries of every row and every column of a tile are kept. Scores may be signed; for a weight pass
    ``weight.abs()``. NaN and infinities rank as ±2^100, so the mask is always valid. Deterministic. Of 2:4, ties
    go to the first of the row pairings (01)(23), (02)(13), (03)(12); then the upper row of a pair prefers columns 01,
    then 23, then the left column of each half. Of 1:4 and 3:4, they go to the first permutation that is kept, or
    pruned, in lexicographic order.

    Args:
        scores: ``[..., O, I]``, any floating dtype; O and I multiples of 4. Ranked in float32 (float64 in float64).
        n: Entries kept of every row and column of a tile: 1, 2 or 3.

    Returns:
        bool, same shape.

    Raises:
        TypeError: If the scores are no dense floating-point tensor.
        ValueError: If O or I is not a multiple of 4, or n is not allowed.

    Example:
        >>> import torch
        >>> mask = transposable_mask(torch.randn(8, 8).abs())
        >>> is_transposable(mask), is_transposable(mask.T)
        (True, True)

        One of every four, of a stack of matrices:

        >>> transposable_mask(torch.eye(4).expand(3, 4, 4), n=1)[0].int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]

    Source: the complementary-pair identity; derivation in ``kernels/mask_search/README.md``. The pattern is from
    Hubara et al., "Accelerated Sparse Neural Training", arXiv 2102.08124.
    """
    _require_kept(n)
    if n != 2:
        return unpack_codes(transposable_codes(scores, n))
    mask: Tensor = search_tiles_with_mask(_as_matrix(scores))[1]
    return mask.view(scores.shape)


def nm_mask(scores: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> Tensor:
    """Return the mask of the n largest of every m consecutive scores along one dimension.

    On ties the earlier entry is kept. NaN and infinities rank as ±2^100.

    Args:
        scores: Any shape, any floating dtype; the size along ``dim`` a multiple of m.
        n: Entries kept of each group, 0 to m.
        m: Size of a group.
        dim: The dimension the groups lie along.

    Returns:
        bool, same shape.

    Raises:
        TypeError: If the scores are no dense floating-point tensor.
        ValueError: If n, m, ``dim`` or the size along ``dim`` does not fit.

    Example:
        >>> import torch
        >>> nm_mask(torch.tensor([[4.0, 1.0, 3.0, 2.0]])).tolist()
        [[True, False, True, False]]
    """
    require_floating("scores", scores)
    _require_nm("scores", scores, n, m, dim)
    moved = scores.movedim(dim, -1)
    return search_row_wise(moved, n, m).movedim(-1, dim).contiguous()


def is_transposable(mask: Tensor, n: int = 2) -> bool:
    """Say whether every aligned 4×4 tile keeps exactly n entries of each of its rows and columns.

    Args:
        mask: bool ``[..., O, I]``.
        n: 1, 2 or 3.

    Raises:
        TypeError: If the mask is no dense bool tensor.
        ValueError: If O or I is not a multiple of 4, or n is not allowed.

    Example:
        >>> import torch
        >>> is_transposable(torch.ones(4, 4, dtype=torch.bool))
        False
    """
    require_dtype("mask", mask, torch.bool)
    require_tiles("mask", mask.shape)
    _require_kept(n)
    return _exactly(mask, n, 4, -1) and _exactly(mask, n, 4, -2)


def is_nm(mask: Tensor, n: int = 2, m: int = 4, dim: int = -1) -> bool:
    """Say whether exactly n of every m consecutive entries along ``dim`` are kept.

    Args:
        mask: bool, any shape; the size along ``dim`` a multiple of m.
        n: Entries kept of each group.
        m: Size of a group.
        dim: The dimension the groups lie along.

    Raises:
        TypeError: If the mask is no dense bool tensor.
        ValueError: If n, m, ``dim`` or the size along ``dim`` does not fit.

    Example:
        >>> import torch
        >>> is_nm(torch.tensor([True, False, False, True]))
        True
    """
    require_dtype("mask", mask, torch.bool)
    _require_nm("mask", mask, n, m, dim)
    return _exactly(mask, n, m, dim)


def _as_matrix(scores: Tensor) -> Tensor:
    require_floating("scores", scores)
    require_tiles("scores", scores.shape)
    return scores.detach().reshape(scores.shape[:-1].numel(), scores.shape[-1])  # explicit: there may be no columns


def _exactly(mask: Tensor, n: int, m: int, dim: int) -> bool:
    groups = mask.movedim(dim, -1)
    return bool((torch.unflatten(groups, -1, (-1, m)).sum(-1) == n).all()) if mask.numel() else True


def _require_kept(n: int) -> None:
    if not _is_whole(n) or n not in (1, 2, 3):
        raise ValueError(f"n is {n!r}: of four, a transposable mask keeps 1, 2 or 3.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_nm(name: str, tensor: Tensor, n: int, m: int, dim: int) -> None:
    if not (_is_whole(n) and _is_whole(m)) or m < 1 or not 0 <= n <= m:
        raise ValueError(f"n:m is {n!r}:{m!r}: m must be an int of at least 1 and n one between 0 and m.")
    if not _is_whole(dim) or not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(
            f"dim is {dim!r} but {name} has shape {tuple(tensor.shape)}: dim must name one of its dimensions."
        )
    if tensor.shape[dim] % m:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: its size along dim {dim} must be a multiple of m = {m}, "
            "so pad it or choose another m."
        )
