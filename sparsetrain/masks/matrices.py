"""Weights as matrices ``[O, K]``, the left factor of their layer's GEMM, whatever way the layer stores them.

A linear layer's weight is its own matrix; one that is stored ``[I, O]`` is read transposed. A convolution's
``[O, I, *kernel]`` is seen as ``[O, kernel·I]``: groups of four along a row are four input channels at one kernel
position, because channels come last, the layout in which an implicit GEMM reads a channels-last weight.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")


def matrix_of(weight: Tensor, transposed: bool = False) -> Tensor:
    """Return a weight as a matrix, differentiably; a copy if it is a kernel whose channels do not lie last in memory.

    Args:
        weight: ``[O, I, *kernel]``, or ``[O, I]``, which is returned as it is.
        transposed: The weight is ``[I, O]``.

    Returns:
        ``[O, K]`` with K = kernel positions times I; the input channel changes fastest.

    Example:
        >>> import torch
        >>> weight = torch.arange(8).view(1, 2, 2, 2)  # [O, I, height, width]
        >>> matrix_of(weight).tolist()
        [[0, 4, 1, 5, 2, 6, 3, 7]]
    """
    if transposed:
        return weight.t()
    return weight if weight.dim() == 2 else weight.movedim(1, -1).reshape(weight.shape[0], -1)


def weight_of(matrix: Tensor, shape: Sequence[int], transposed: bool = False) -> Tensor:
    """Return the weight of a matrix: the inverse of :func:`matrix_of`, always a view.

    Args:
        matrix: ``[O, K]``.
        shape: Of the weight.
        transposed: The weight is ``[I, O]``.

    Example:
        >>> import torch
        >>> weight = torch.randn(4, 8, 3, 3)
        >>> torch.equal(weight_of(matrix_of(weight), weight.shape), weight)
        True
    """
    if transposed:
        return matrix.t()
    if len(shape) == 2:
        return matrix
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def by_device(weights: Mapping[Key, Tensor]) -> list[dict[Key, Tensor]]:
    """Return weights grouped by device, whose kernels take all of a device in one launch.

    Args:
        weights: By name, or by anything else.

    Example:
        >>> import torch
        >>> by_device({"fc": torch.ones(1)})
        [{'fc': tensor([1.])}]
    """
    devices: dict[torch.device, dict[Key, Tensor]] = {}
    for name, weight in weights.items():
        devices.setdefault(weight.device, {})[name] = weight
    return list(devices.values())
