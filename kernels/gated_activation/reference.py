"""Gated activations of transformer MLPs in plain torch, forward and backward."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("swiglu", "geglu", "relu2")


def activate(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """Compute an activation in float32 (float64 for float64) and round once.

    Args:
        gate: Any shape, floating point.
        up: The same shape; None for ``"relu2"``.
        kind: ``"swiglu"``: silu(gate)·up; ``"geglu"``: gelu(gate)·up with the exact erf; ``"relu2"``: relu(gate)².

    Returns:
        The gate's shape, dtype and layout.

    Example:
        >>> activate(torch.tensor([-1.0, 3.0]), None, "relu2").tolist()
        [0.0, 9.0]
    """
    x = _wide(gate)
    if kind == "relu2":
        return _in_place_of(gate, F.relu(x).square())
    assert up is not None
    return _in_place_of(gate, (F.silu(x) if kind == "swiglu" else F.gelu(x)) * _wide(up))


def differentiate(grad: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
    """Compute the gradients of ``gate`` and ``up`` from that of the result; nothing but the inputs is needed.

    Example:
        >>> differentiate(torch.ones(2), torch.tensor([-1.0, 3.0]), None, "relu2")[0].tolist()
        [0.0, 6.0]
    """
    x, g = _wide(gate), _wide(grad)
    if kind == "relu2":
        return _in_place_of(gate, 2 * g * F.relu(x)), None
    assert up is not None
    if kind == "swiglu":
        sigmoid = torch.sigmoid(x)
        value, slope = x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    else:
        share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        value, slope = x * share, share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return _in_place_of(gate, g * _wide(up) * slope), _in_place_of(up, g * value)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _in_place_of(operand: Tensor, value: Tensor) -> Tensor:
    """Round a value to an operand's dtype, in its layout."""
    return torch.empty_like(operand).copy_(value)
