"""Where a weight may be cut: between its 4×4 tiles."""

from typing import Any

from torch import Tensor

from ...distributed.shards import is_cut


def why_not_cut(weight: Any) -> str | None:
    """Return why parts of a weight hold no whole tiles, with the remedy; None if they do.

    The answer is the same in every process.

    Args:
        weight: A DTensor ``[O, I]``, or ``[O, I, *kernel]``.
    """
    sizes, parts = list(weight.shape), [1] * weight.dim()
    cuts = [*zip(weight.placements, weight.device_mesh.shape, strict=True)]
    for placement, count in reversed(cuts):  # tensor parallelism, which has the last dimension, cuts first
        if not is_cut(placement):
            if not placement.is_replicate():
                return f"it is {placement}, a sum over processes: redistribute it first."
            continue
        dimension = placement.dim
        if dimension and weight.dim() > 2:
            return f"a kernel is cut in dimension {dimension}: shard it by its output channels."
        sizes[dimension], parts[dimension] = -(-sizes[dimension] // count), parts[dimension] * count
        if sizes[dimension] % 4:
            what = "rows" if dimension == 0 else "columns"
            return (
                f"{weight.shape[dimension]} {what} over {parts[dimension]} processes are parts of {sizes[dimension]}, "
                "which cut through 4×4 tiles: use fewer shards (a mesh with a replicate dimension), a "
                "shard_placement_fn that cuts the other dimension, or exclude the layer."
            )
    return None


def require_shardable(name: str, layer: object, weight: Tensor) -> None:
    """Raise ``ValueError`` unless a layer's weight, a DTensor, is cut between tiles.

    Args:
        name: Of the layer; empty if it is not known.
        layer: Whose weight it is.
        weight: The DTensor.
    """
    if reason := why_not_cut(weight):
        raise ValueError(f"layer {name or type(layer).__name__!r} cannot be sharded like this: {reason}")


def is_root(layer: object) -> bool:
    """Say whether FSDP2 was applied to a layer itself, whose class it then replaces.

    Example:
        >>> is_root(object())
        False
    """
    return any(kind.__name__ == "FSDPModule" for kind in type(layer).__mro__)


def require_no_root(name: str, layer: object) -> None:
    """Raise ``ValueError`` if FSDP2 was applied to a layer itself.

    Args:
        name: Of the layer; empty if it is not known.
        layer: A linear layer or a convolution.

    Example:
        >>> require_no_root("fc", object())
    """
    if is_root(layer):
        raise ValueError(
            f"layer {name or type(layer).__name__!r} is a root of its own (fully_shard was applied to it): apply "
            "fully_shard to the block around it, or exclude the layer."
        )
