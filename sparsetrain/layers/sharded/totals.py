"""Sums over the processes that hold other parts of layers' weights: small, in float64, in one message."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...distributed.shards import groups_of, is_first
from ..masked_layer import MaskedLayer

Column = Mapping[str, Tensor]
"""Layer name to numbers, measured on the part that lies here."""


@torch.no_grad()
def sum_over_parts(layers: Mapping[str, MaskedLayer], *columns: Column) -> tuple[Column, ...]:
    """Add up what every process has measured on its parts of the layers' weights; all of them have to call this.

    Nothing is sent, and nothing copied, where weights are whole.

    Args:
        layers: By name.
        columns: Each with numbers of some layers, the same ones everywhere.

    Returns:
        The columns with sums; in float64 where something was added.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> (sums,) = sum_over_parts({"fc": SparseLinear(8, 4)}, {"fc": torch.tensor([32])})
        >>> sums["fc"].tolist()
        [32]
    """
    together: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in sorted(layers.items()):  # sets, which layers are often chosen by, have another order elsewhere
        if layer.shard is not None:
            key: tuple[Any, ...] = tuple(groups_of(layer.shard.weight, cut=True))
            together.setdefault(key, []).append(name)
    found = tuple(dict(column) for column in columns)
    for key, names in together.items():
        own = [(column, name) for column in found for name in names if name in column]
        if not key or not own:
            continue
        device = layers[names[0]].master.device
        flat = torch.cat([column[name].reshape(-1).to(device, torch.float64) for column, name in own])
        for group in key:
            dist.all_reduce(flat, group=group)
        sizes = [column[name].numel() for column, name in own]
        for (column, name), part in zip(own, torch.split(flat, sizes), strict=True):
            column[name] = part.view(column[name].shape)
    return found


def sum_over_mesh(layers: Mapping[str, MaskedLayer], numbers: Tensor) -> Tensor:
    """Add up numbers over all processes of the mesh that the layers' weights are spread over.

    Who measures parts that several processes hold divides by :func:`~sparsetrain.distributed.shards.copies` before.

    Args:
        layers: By name, on one mesh or parts of it.
        numbers: Of this process.

    Returns:
        The sums; the numbers themselves where weights are whole.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> sum_over_mesh({"fc": SparseLinear(8, 4)}, torch.tensor([1.0])).tolist()
        [1.0]
    """
    mesh = mesh_of(layers)
    if mesh is None:
        return numbers
    numbers = numbers.clone()
    for dimension in range(mesh.ndim):
        if mesh.size(dimension) > 1:
            dist.all_reduce(numbers, group=mesh.get_group(dimension))
    return numbers


def counts_part(layer: MaskedLayer, mesh: Any) -> bool:
    """Say whether this process is the first of a mesh that holds its part of a layer's weight, or a whole weight.

    Args:
        layer: Whose weight it is.
        mesh: What :func:`mesh_of` returned.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> counts_part(SparseLinear(8, 4), mesh=None)
        True
    """
    if mesh is None:
        return True
    cut = [] if layer.shard is None else groups_of(layer.shard.weight, cut=True)
    dimensions = [dimension for dimension in range(mesh.ndim) if mesh.size(dimension) > 1]
    return all(mesh.get_local_rank(each) == 0 for each in dimensions if mesh.get_group(each) not in cut)


def processes(layers: Mapping[str, MaskedLayer]) -> int:
    """Return how many processes the layers' weights are spread over; 1 where they are whole.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> processes({"fc": SparseLinear(8, 4)})
        1
    """
    mesh = mesh_of(layers)
    return 1 if mesh is None else int(mesh.size())


def mesh_of(layers: Mapping[str, MaskedLayer]) -> Any:
    """Return the mesh that the layers' weights are spread over; None where they are whole.

    Example:
        >>> mesh_of({}) is None
        True
    """
    meshes: list[Any] = [layer.shard.weight.device_mesh for layer in layers.values() if layer.shard is not None]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: int(mesh.size()), default=None)  # the others are parts of it


def total(column: Column) -> float:
    """Add up a column over layers, with one transfer to the host; 0 if it is empty.

    Example:
        >>> total({"first": torch.tensor(2), "second": torch.tensor(3)})
        5.0
    """
    return float(torch.stack([entry.cpu() for entry in column.values()]).sum()) if column else 0.0


def counted_once(layer: MaskedLayer, total: Tensor) -> Tensor:
    """Return a total for this process to hold, so that :func:`sum_over_parts` gives the total again."""
    return total if layer.shard is None or is_first(layer.shard.weight) else torch.zeros_like(total)
