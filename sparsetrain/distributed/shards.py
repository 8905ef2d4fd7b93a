"""Tensors that are spread over processes (DTensors): the part that lies here, and who holds the rest."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels.torch_internals import local_tensor

PLAIN = (Tensor, nn.Parameter)


def is_spread(tensor: Any) -> bool:
    """Say whether a tensor is spread over processes, as FSDP2 and tensor parallelism leave weights.

    Example:
        >>> is_spread(torch.zeros(4))
        False
    """
    # not by its class, whose import takes a second
    return type(tensor) not in PLAIN and isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies in this process: the memory itself, without a graph; all of a plain one.

    Example:
        >>> weight = torch.zeros(4)
        >>> local(weight) is weight
        True
    """
    return local_tensor(tensor) if is_spread(tensor) else tensor


def spread_like(part: Tensor, whole: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor that is spread as another is, given this process's part.

    Args:
        part: What lies here.
        whole: A DTensor of as many dimensions.
        shape: Of the result, over all processes.
    """
    return spread_over(part, whole.device_mesh, whole.placements, shape)  # type: ignore[attr-defined]


def spread_over(part: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Tensor:
    """Return a tensor that is spread over a mesh, given this process's part, as :func:`spread_like`."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(part, mesh, placements, shape=torch.Size(shape), stride=stride)


def replicated_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as what every process of another's mesh holds; as it is if the other is plain.

    Example:
        >>> whole = torch.zeros(4)
        >>> replicated_like(whole, torch.zeros(8)) is whole
        True
    """
    if not is_spread(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim)


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies here, differentiably.

    Example:
        >>> weight = torch.zeros(4)
        >>> to_local(weight) is weight
        True
    """
    return cast(Tensor, tensor.to_local()) if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def gradient_here(parameter: Tensor) -> Tensor | None:
    """Return the part that lies here of a parameter's gradient, which is spread as the parameter is from now on.

    Where every process has tokens of its own, DTensor leaves the gradient as a sum that is still to be made.

    Example:
        >>> gradient_here(nn.Parameter(torch.zeros(4))) is None
        True
    """
    gradient: Any = parameter.grad
    if gradient is not None and is_spread(gradient) and gradient.placements != parameter.placements:  # type: ignore[attr-defined]
        parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return None if gradient is None else local(gradient)


def part_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part that lies here of a tensor that is spread as another is; a view, and nothing is sent.

    Args:
        whole: Plain, the same in every process; cut where ``like`` is cut, in units of its own rows.
        like: A DTensor of as many dimensions.
    """
    return part_of(whole, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def part_of(whole: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """Return the part that lies here of a tensor that is the same in every process, as :func:`part_like`."""
    cuts = [cut for cut in enumerate(placements) if is_cut(cut[1])]
    # FSDP2 cuts in strides what tensor parallelism, with a later dimension of the mesh, has cut before
    for dimension, placement in sorted(cuts, key=lambda cut: hasattr(cut[1], "split_factor")):
        length = whole.shape[placement.dim]
        size = -(-length // mesh.size(dimension))
        start = min(mesh.get_local_rank(dimension) * size, length)
        whole = whole.narrow(placement.dim, start, min(size, length - start))
    return whole


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor, of any dtype; every process of its mesh has to call this.

    Example:
        >>> whole = torch.zeros(4)
        >>> gathered(whole) is whole
        True
    """
    if not is_spread(tensor):
        return tensor
    part = local(tensor).detach().contiguous().unsqueeze(-1).view(torch.uint8)  # neither gloo nor NCCL sends int16
    whole: Tensor = spread_like(part, tensor, (*tensor.shape, part.shape[-1])).full_tensor()  # type: ignore[attr-defined]
    return whole.contiguous().view(tensor.dtype).squeeze(-1)


def is_cut(placement: Any) -> bool:
    """Say whether a DTensor's placement cuts it in a dimension, in strides too."""
    return getattr(placement, "dim", None) is not None


def first_cut(tensor: Tensor) -> int | None:
    """Return the dimension in which the first cut of a DTensor is, which is FSDP2's where that shards it.

    Example:
        >>> first_cut(torch.zeros(4)) is None
        True
    """
    placements: Any = tensor.placements if is_spread(tensor) else ()  # type: ignore[attr-defined]
    return next((placement.dim for placement in placements if is_cut(placement)), None)


def groups_of(tensor: Tensor, cut: bool) -> list[dist.ProcessGroup]:
    """Return the groups of processes that hold other parts of a DTensor (``cut``), or the same part.

    One for each dimension of its mesh; over several, reduce one after the other.
    """
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return [
        mesh.get_group(dimension)
        for dimension, placement in enumerate(placements)
        if is_cut(placement) == cut and mesh.size(dimension) > 1
    ]


def copies(tensor: Tensor, processes: int) -> int:
    """Return how many of some processes, each of which holds a part of a tensor, hold the same part.

    Example:
        >>> copies(torch.zeros(4), processes=2)
        2
    """
    cuts = zip(tensor.device_mesh.shape, tensor.placements, strict=True) if is_spread(tensor) else ()  # type: ignore[attr-defined]
    parts: int = math.prod(size for size, placement in cuts if is_cut(placement))
    return processes // parts


def is_first(tensor: Tensor) -> bool:
    """Say whether this process holds the first part of a DTensor, in every dimension in which it is cut."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    return all(
        mesh.get_local_rank(dimension) == 0 for dimension, placement in enumerate(placements) if is_cut(placement)
    )


def placement_of(tensor: Tensor) -> str:
    """Return in words how a tensor is spread, and over how many processes; other processes may have another mesh.

    Example:
        >>> placement_of(torch.zeros(4))
        'plain'
    """
    if not is_spread(tensor):
        return "plain"
    return f"{tensor.placements} over {tuple(tensor.device_mesh.shape)} processes"  # type: ignore[attr-defined]
