"""``Peers``: the processes whose gradients are averaged with those of this one."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from .shards import is_cut, is_spread
from .world import world_size


class Peers(NamedTuple):
    """The processes whose gradients are averaged with those of this one, this one among them.

    Args:
        groups: Over all of which, one after the other, is reduced; none in a run with one process.

    Example:
        >>> Peers().size
        1
    """

    groups: tuple[dist.ProcessGroup | None, ...] = ()

    @property
    def size(self) -> int:
        """How many they are."""
        size = 1
        for group in self.groups:
            size *= dist.get_world_size(group)
        return size

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over them, in place; nothing is sent if there are none."""
        for group in self.groups:
            dist.all_reduce(tensor, group=group)


ALONE = Peers()
"""Of a run in one process."""


def peers_of(model: nn.Module, weights: Iterable[Tensor], group: dist.ProcessGroup | None) -> Peers:
    """Return a run's peers: those of the weights' mesh if FSDP2 gathers weights, else a group, or all processes.

    Args:
        model: Whether FSDP2 gathers its weights is found there.
        weights: Of the sparse layers; those that are spread, over one mesh.
        group: Of processes that hold the same weights, or the same parts of them; None for all, and under tensor
            parallelism alone for none.
    """
    spread: Sequence[Any] = [weight for weight in weights if is_spread(weight)]
    if not spread:
        return Peers((group,) if world_size() > 1 and dist.get_world_size(group) > 1 else ())
    mesh, count = spread[0].device_mesh, _averaged_dimensions(model, spread[0])
    if not count:
        return Peers((group,) if group is not None and dist.get_world_size(group) > 1 else ())
    return Peers(tuple(mesh.get_group(dimension) for dimension in range(count) if mesh.size(dimension) > 1))


def is_parallel(model: nn.Module, weight: Tensor) -> bool:
    """Say whether a model's weight is spread by tensor parallelism, so that it is a DTensor in the forward too.

    Example:
        >>> layer = nn.Linear(4, 4)
        >>> is_parallel(layer, layer.weight)
        False
    """
    return is_spread(weight) and _averaged_dimensions(model, weight) < weight.device_mesh.ndim  # type: ignore[attr-defined]


def _averaged_dimensions(model: nn.Module, weight: Any) -> int:
    """Return over how many of the first dimensions of a weight's mesh FSDP2 averages gradients."""
    cut = [dimension for dimension, placement in enumerate(weight.placements) if is_cut(placement)]
    # FSDP2's dimensions come first, and the last of them is cut; the rest is tensor parallelism, which shares a batch
    return cut[0] + 1 if cut and is_gathered(model) else 0


def is_gathered(model: nn.Module) -> bool:
    """Say whether FSDP2 gathers weights of a model.

    Example:
        >>> is_gathered(nn.Linear(4, 4))
        False
    """
    return bool(fsdp_modules(model))


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 was applied to.

    Example:
        >>> fsdp_modules(nn.Linear(4, 4))
        []
    """
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def reshard_(modules: Iterable[nn.Module]) -> None:
    """Have FSDP2 let go of all weights that it has gathered for modules that it was applied to.

    Example:
        >>> reshard_(fsdp_modules(nn.Linear(4, 4)))
    """
    for module in modules:
        module.reshard()  # type: ignore[operator]


def everyone_with(model: Any, group: dist.ProcessGroup | None) -> tuple[dist.ProcessGroup | None, ...]:
    """Return the groups of all processes that make a run together with this one; none if it is alone.

    Args:
        model: Where meshes of spread weights are found; whatever the user passed.
        group: Of processes that hold the same weights; None for all.

    Example:
        >>> everyone_with(nn.Linear(4, 4), None)
        ()
    """
    count = world_size()
    if count == 1:
        return ()
    parameters: Iterable[Any] = model.parameters() if isinstance(model, nn.Module) else ()
    meshes: list[Any] = [entry.device_mesh for entry in parameters if is_spread(entry)]
    if not meshes:
        return (group,) if dist.get_world_size(group) > 1 else ()
    mesh = max(meshes, key=lambda entry: entry.size())
    if mesh.size() == count:
        return (None,)  # even if ranks see other meshes
    return tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim) if mesh.size(dimension) > 1)
