"""Plain tensors: dense, with values, in one piece of memory; what everything that takes scores and masks needs."""

from typing import Any

import torch
from torch import Tensor


def why_not_plain(value: Any) -> tuple[str, str] | None:
    """Say what a value is instead of a plain tensor, and how to make it one; None if it is one.

    Example:
        >>> why_not_plain([1.0, 2.0])
        ('a list', 'convert it with torch.as_tensor')
    """
    if not isinstance(value, Tensor):
        return ("None" if value is None else f"a {type(value).__name__}"), "convert it with torch.as_tensor"
    if type(value).__name__ == "DTensor":
        return "a DTensor", "gather it with .full_tensor()"
    if value.is_nested:
        return "a nested tensor", "pass its parts one by one"
    if "SparseSemiStructured" in type(value).__name__:
        return f"a {type(value).__name__}", "make it dense with .to_dense()"
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}", "make it dense with .to_dense()"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})", "convert it with .dequantize()"
    if value.is_meta:
        return "on the meta device, without values", "load it first"
    return None


def require_plain(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is a plain tensor.

    Example:
        >>> require_plain("scores", torch.ones(4, 4))
    """
    if reason := why_not_plain(value):
        raise TypeError(f"{name} is {reason[0]}: it must be a dense torch.Tensor, so {reason[1]}.")


def require_dtype(name: str, value: Any, dtype: torch.dtype) -> None:
    """Raise ``TypeError`` unless a value is a plain tensor of a dtype.

    Example:
        >>> require_dtype("mask", torch.ones(4, 4, dtype=torch.bool), torch.bool)
    """
    require_plain(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}: it must be {dtype}, so convert it with .to({dtype}).")


def require_floating(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless a value is a plain floating-point tensor.

    Example:
        >>> require_floating("scores", torch.ones(4, 4))
    """
    require_plain(name, value)
    if not value.is_floating_point():
        conversion = ".abs()" if value.is_complex() else ".float()"
        raise TypeError(f"{name} has dtype {value.dtype}: it must be floating point, so convert it with {conversion}.")
