"""Sums of many tensors over the processes whose gradients are averaged, in one message a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..masks.matrices import by_device


def summed(tensors: Sequence[Tensor], peers: Peers) -> list[Tensor]:
    """Return the sums of tensors over a run's peers; the tensors themselves if there are none.

    Args:
        tensors: Of the same shapes, in the same order, in every process.
        peers: Of the run.

    Example:
        >>> summed([torch.ones(2)], Peers())
        [tensor([1., 1.])]
    """
    if peers.size == 1:
        return [*tensors]
    found: dict[int, Tensor] = {}
    for here in by_device(dict(enumerate(tensors))):
        flat = torch.cat([tensor.flatten() for tensor in here.values()])
        peers.sum_(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in here.values()])
        found.update({i: part.view_as(tensor) for (i, tensor), part in zip(here.items(), parts, strict=True)})
    return [found[number] for number in range(len(tensors))]
