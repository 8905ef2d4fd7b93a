"""Casts of autograd functions' arguments, as autocast casts those of torch's own functions."""

import torch
from torch import Tensor


def as_autocast(tensor: Tensor) -> Tensor:
    """Return a tensor in autocast's dtype if autocast is on; float64 and integers stay, as they do in torch.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     as_autocast(torch.zeros(1)).dtype, as_autocast(torch.zeros(1, dtype=torch.float64)).dtype
        (torch.bfloat16, torch.float64)
    """
    dtype = autocast_dtype(tensor)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that autocast, if it is on, would give a tensor.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocast_dtype(torch.zeros(1))
        torch.bfloat16
    """
    device = "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type
    if not torch.is_autocast_enabled(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)
