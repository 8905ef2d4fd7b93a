"""What runs on sharded weights are refused for beside the alignment of tiles: meshes, and options of FSDP2."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...distributed.shards import is_spread, placement_of
from ...kernels.torch_internals import fsdp_parameters
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
    _require_one_mesh(weights)
    if not any(map(is_spread, weights.values())):
        return
    for name, layer in layers.items():
        require_no_root(name, layer)
    _require_plain_gathering(model, weights)


def _require_one_mesh(weights: Mapping[str, Any]) -> None:
    first = next(iter(weights), None)
    for name, weight in weights.items():
        one, other = (getattr(entry, "device_mesh", None) for entry in (weights[first], weight))  # type: ignore[index]
        if one != other:
            raise ValueError(
                f"layer {first!r} has a weight that is {placement_of(weights[first])} but {name!r} has one that is "  # type: ignore[index]
                f"{placement_of(weight)}: shard all sparse layers over one mesh, or exclude those of the other."
            )


def _require_plain_gathering(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` if FSDP2 keeps shards on the host, or leaves gathered weights on a part of the mesh."""
    parameters = {id(parameter.sharded_param): parameter for parameter in fsdp_parameters(model)}
    for name, weight in weights.items():
        parameter = parameters.get(id(weight))
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
