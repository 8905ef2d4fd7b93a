"""What runs on sharded weights are refused for beside the alignment of tiles: meshes, and options of FSDP2."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...distributed.peers import is_gathered
from ...distributed.shards import is_spread, placement_of
from ...kernels.torch_internals import SHARDED_MODULE, fsdp_parameters
from .alignment import require_no_root


def require_one_run(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise ``ValueError`` unless one run can train layers as they are sharded; nothing is sent.

    Args:
        model: Whose layers they are, not gathered.
        layers: By name.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> require_one_run(model, {"0": model[0]})
    """
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    _require_one_mesh(model, weights)
    if not any(map(is_spread, weights.values())):
        return
    for name, layer in layers.items():
        require_no_root(name, layer)
    known = {id(parameter.sharded_param): parameter for parameter in fsdp_parameters(model)}
    for name, layer in layers.items():
        if is_spread(weights[name]) and getattr(layer, SHARDED_MODULE, False) and id(weights[name]) not in known:
            raise ValueError(
                f"layer {name!r} is sharded by a fully_shard that was applied to a module above the run's model: make "
                "the run of that module."
            )
    _require_plain_gathering(weights, known)


def _require_one_mesh(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless all weights lie on one mesh, or on parts of it, as a head beside parallel layers."""
    meshes: dict[str, Any] = {name: getattr(weight, "device_mesh", None) for name, weight in weights.items()}
    widest = max(meshes, key=lambda name: 0 if meshes[name] is None else meshes[name].size(), default="")
    for name, mesh in meshes.items():
        if not _is_part(mesh, meshes[widest], is_gathered(model)):
            raise ValueError(
                f"layer {widest!r} has a weight that is {placement_of(weights[widest])} but {name!r} has one that is "
                f"{placement_of(weights[name])}: shard all sparse layers over one mesh, or exclude those of the other."
            )


def _is_part(mesh: Any, whole: Any, gathers: bool) -> bool:
    if mesh is None or mesh == whole:  # what FSDP2 leaves out has gradients of its own in every process
        return mesh == whole or not gathers
    names, others = mesh.mesh_dim_names, whole.mesh_dim_names
    return mesh.size() < whole.size() and bool(names) and bool(others) and set(names) < set(others)


def _require_plain_gathering(weights: Mapping[str, Tensor], known: Mapping[int, Any]) -> None:
    """Raise ``ValueError`` if FSDP2 keeps shards on the host, or leaves gathered weights on a part of the mesh."""
    for name, weight in weights.items():
        parameter = known.get(id(weight))
        if parameter is None:  # tensor parallelism alone
            continue
        if parameter.offload_to_cpu:
            raise ValueError(
                f"layer {name!r} is sharded with offload_policy=CPUOffloadPolicy(...), which moves shards away from "
                "their masks: use OffloadPolicy(), the default, or more shards."
            )
        after = parameter.post_forward_mesh_info
        if after is not None and after != parameter.mesh_info:
            raise ValueError(
                f"layer {name!r} is sharded with reshard_after_forward={after.shard_mesh_size}, which gathers it from "
                "parts that have no masks: use True or False."
            )
