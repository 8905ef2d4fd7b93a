"""Where a weight may be cut: between its 4×4 tiles."""

from typing import Any

from torch import Tensor

from ...distributed.shards import is_cut
from ...kernels.torch_internals import SHARDED_MODULE


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


def is_even(weight: Any) -> bool:
    """Say whether all parts of a weight, a DTensor, are of the same size."""
    parts = [1] * weight.dim()
    for placement, count in zip(weight.placements, weight.device_mesh.shape, strict=True):
        if is_cut(placement):
            parts[placement.dim] *= count
    return not any(size % count for size, count in zip(weight.shape, parts, strict=True))


def require_shardable(name: str, layer: object, weight: Tensor) -> None:
    """Raise ``ValueError`` unless a layer's weight, a DTensor, is cut between tiles.

    Args:
        name: Of the layer; empty if it is not known.
        layer: Whose weight it is.
        weight: The DTensor.
    """
    if reason := why_not_cut(weight):
        raise ValueError(f"layer {name or type(layer).__name__!r} cannot be sharded like this: {reason}")


def require_even(name: str, layer: object, weight: Tensor) -> None:
    """Raise ``RuntimeError`` if FSDP2 would pad some parts of a layer's weight, and so replace what hooks hang on.

    Args:
        name: Of the layer; empty if it is not known.
        layer: Whose weight it is.
        weight: A DTensor.
    """
    if getattr(layer, SHARDED_MODULE, False) and not is_even(weight):
        raise RuntimeError(
            f"layer {name or type(layer).__name__!r} is sharded in uneven parts and was converted before a run's step "
            "took note of that: convert the model before fully_shard."
        )


def parallel_too_late(name: str) -> str:
    """Say that a layer came under tensor parallelism too late.

    Example:
        >>> parallel_too_late("fc").partition(" after ")[0]
        "layer 'fc' came under tensor parallelism"
    """
    return (
        f"layer {name!r} came under tensor parallelism after its run was made, for parts of whose masks and statistics "
        "it is too late: make the run after parallelize_module."
    )


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
