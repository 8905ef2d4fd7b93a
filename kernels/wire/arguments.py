"""What the operators of wires are given, checked."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import KERNEL_DTYPES
from ..pack import Side
from ..pack.arguments import require_lists, require_tensor, require_weight, targets_of
from .numbering import NO_PATTERN


def require_wire(values: Tensor, numbers: Tensor, place: str = "") -> None:
    """Raise ``ValueError`` unless these are a wire; its lists' ``place``, if any, is named."""
    if values.dim() != 2 or values.shape[0] % 4 or values.shape[1] % 2 or values.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"the wire's values{place} are {values.dtype} {tuple(values.shape)}: they must be [O, I/2] in float32, "
            "float16 or bfloat16, O and I multiples of 4, so pad the weight before its wire is made."
        )
    require_tensor(f"values{place}", values, values.dtype, tuple(values.shape), values.device)
    require_tensor(f"numbers{place}", numbers, torch.uint8, _tiles_of(values), values.device)


def require_outputs(weight: Tensor, codes: Tensor, values: Tensor, numbers: Tensor) -> None:
    """Raise ``ValueError`` unless a weight can be written to a wire, which may have more rows."""
    require_weight(weight, codes, values.dtype)
    require_wire(values, numbers)
    if values.shape[0] < weight.shape[0] or 2 * values.shape[1] != weight.shape[1]:
        raise ValueError(
            f"values is {tuple(values.shape)}: for a weight {tuple(weight.shape)} it must have at least "
            f"{weight.shape[0]} rows, of {weight.shape[1] // 2}."
        )


def require_dense(values: Tensor, numbers: Tensor, dense: Tensor) -> None:
    """Raise ``ValueError`` unless a wire can be written to a dense weight."""
    require_wire(values, numbers)
    require_tensor("dense", dense, values.dtype, shape_of(values), values.device)


def require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` unless a tensor has a dtype."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}: it must be {dtype}.")


def require_patterns(codes: Tensor, numbers: Tensor) -> None:
    """Raise ``ValueError`` unless every code has a number; waits for the device."""
    other = codes[numbers == NO_PATTERN]
    if other.numel():
        raise ValueError(
            f"codes has {other.numel()} tiles that do not keep two of every row and column, the first "
            f"{int(other[0]) & 0xFFFF:#06x}: a wire has transposable 2:4 masks alone, so search one first."
        )


def shape_of(values: Tensor) -> tuple[int, int]:
    """Return the shape of the weight of a wire's values."""
    return values.shape[0], 2 * values.shape[1]


def wire_sides_of(kept: Sequence[Tensor], numbers: Sequence[Tensor], *targets: Any) -> tuple[Side | None, Side | None]:
    """Do what ``sides_of`` does for wires, whose further arguments are the same."""
    require_lists("kept, numbers", (kept, numbers), targets[:4])
    for position, wire in enumerate(zip(kept, numbers, strict=True)):
        require_wire(*wire, place=f"[{position}]")
        require_dtype(f"kept[{position}]", wire[0], kept[0].dtype)
    dtype = kept[0].dtype if kept else torch.float32
    return targets_of([*map(shape_of, kept)], kept, dtype, *targets)


def _tiles_of(values: Tensor) -> tuple[int, int]:
    return values.shape[0] // 4, values.shape[1] // 2
