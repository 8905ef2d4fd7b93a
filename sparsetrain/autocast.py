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
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
