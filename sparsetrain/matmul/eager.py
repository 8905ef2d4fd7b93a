"""Whether code runs as it is written, or something follows it: a compiler, a tracer, a transform, a dispatch mode."""

import torch
from torch import Tensor, nn

from ..kernels.torch_internals import count_dispatch_modes, is_tracing, is_transformed

PLAIN = (Tensor, nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is of no subclass, whose operations might be others."""
    return type(tensor) in PLAIN


def is_eager(tensor: Tensor) -> bool:
    """Return whether operations on a tensor do what they say and nothing else, so that results may be kept.

    Example:
        >>> is_eager(torch.zeros(1)), torch.func.vmap(lambda x: x + is_eager(x))(torch.zeros(1)).item()
        (True, 0.0)
    """
    return not (
        torch.compiler.is_compiling()
        or not is_plain(tensor)
        or count_dispatch_modes()
        or is_tracing()
        or is_transformed()
    )
