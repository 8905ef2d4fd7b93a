"""Weights as matrices: a convolution's ``[O, I, *kernel]`` seen as ``[O, kernel·I]``, the left factor of its GEMM.

Groups of four along a row are four input channels at one kernel position, because channels come last: the layout in
which an implicit GEMM reads a channels-last weight. A linear layer's weight is its own matrix.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


def matrix_of(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, differentiably; a view if channels lie last in memory, else a copy.

    Args:
        weight: ``[O, I, *kernel]``, or ``[O, I]``, which is returned as it is.

    Returns:
        ``[O, K]`` with K = kernel positions times I; the input channel changes fastest.

    Example:
        >>> import torch
        >>> weight = torch.arange(8).view(1, 2, 2, 2)  # [O, I, height, width]
        >>> matrix_of(weight).tolist()
        [[0, 4, 1, 5, 2, 6, 3, 7]]
    """
    return weight if weight.dim() == 2 else weight.movedim(1, -1).reshape(weight.shape[0], -1)


def weight_of(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the weight of a matrix: the inverse of :func:`matrix_of`, always a view.

    Args:
        matrix: ``[O, K]``.
        shape: ``[O, I, *kernel]`` or ``[O, I]``.

    Example:
        >>> import torch
        >>> weight = torch.randn(4, 8, 3, 3)
        >>> torch.equal(weight_of(matrix_of(weight), weight.shape), weight)
        True
    """
    if len(shape) == 2:
        return matrix
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


@contextmanager
def written_as_matrices(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give weights, or tensors shaped like them, as matrices to write to, whatever their order in memory.

    Example:
        >>> import torch
        >>> weight = torch.zeros(1, 2, 2, 2)
        >>> with written_as_matrices([weight]) as (matrix,):
        ...     matrix[0, 1] = 5
        >>> weight[0, 1, 0, 0].item()
        5.0
    """
    sources = [weight.detach() for weight in weights]
    matrices = [matrix_of(source) for source in sources]
    yield matrices
    for source, matrix in zip(sources, matrices, strict=True):
        if matrix.data_ptr() != source.data_ptr():  # was a copy
            source.copy_(weight_of(matrix, source.shape))
