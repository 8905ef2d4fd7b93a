"""Gated activations as torch operators with autograd: Triton on CUDA, the reference elsewhere."""

from typing import Any

import torch
from torch import Tensor

from ..dtypes import KERNEL_DTYPES
from .reference import KINDS, activate, differentiate


@torch.library.custom_op("sparsetrain::gated_activation", mutates_args=())
def gated_activation(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    """Activate the hidden layer of a transformer's MLP; differentiable, and only the inputs are kept for backward.

    Args:
        gate: ``[..., H]``, floating point. Operands may lie by rows or by columns (as sparse products may hand over a
            transposed result), each in its own way; none is copied for that.
        up: The gate's shape and dtype; None for ``"relu2"``.
        kind: ``"swiglu"``: silu(gate)·up; ``"geglu"``: gelu(gate)·up with the exact erf; ``"relu2"``: relu(gate)².

    Returns:
        The gate's shape, dtype and layout. Arithmetic is float32, rounded once.

    Raises:
        ValueError: If the kind is unknown, or ``up`` is missing, superfluous or of another shape or dtype.

    Example:
        >>> gated_activation(torch.tensor([-1.0, 3.0]), None, "relu2").tolist()
        [0.0, 9.0]

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; ReLU²: So et al., "Primer", arXiv 2109.08668.
    """
    _check(gate, up, kind)
    return activate(gate, up, kind)


@torch.library.custom_op("sparsetrain::gated_activation_backward", mutates_args=())
def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> list[Tensor]:
    """Return the gradients of ``gate`` and, if there is one, ``up``, each in its operand's layout.

    Args:
        grad: Gradient of the result of :func:`gated_activation`, of its shape and dtype.
        gate: As it went in.
        up: As it went in.
        kind: As it went in.

    Raises:
        ValueError: As :func:`gated_activation` does.

    Example:
        >>> gated_activation_backward(torch.ones(2), torch.tensor([-1.0, 3.0]), None, "relu2")[0].tolist()
        [0.0, 6.0]
    """
    _check(gate, up, kind)
    return [part for part in differentiate(grad, gate, up, kind) if part is not None]


@gated_activation.register_fake
def _(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    _check(gate, up, kind)
    return torch.empty_like(gate)


@gated_activation_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> list[Tensor]:
    return [torch.empty_like(operand) for operand in (gate, up) if operand is not None]


@gated_activation.register_kernel("cuda")
def _(gate: Tensor, up: Tensor | None, kind: str) -> Tensor:
    from .triton_kernel import forward_into

    _check(gate, up, kind)
    if not _suits_kernel(gate, up):
        return activate(gate, up, kind)
    result = torch.empty_like(gate)
    if gate.numel():
        forward_into(_matrix(gate), None if up is None else _matrix(up), kind, _matrix(result))
    return result


@gated_activation_backward.register_kernel("cuda")
def _(grad: Tensor, gate: Tensor, up: Tensor | None, kind: str) -> list[Tensor]:
    from .triton_kernel import backward_into

    _check(gate, up, kind)
    if not _suits_kernel(gate, up, grad):
        return [part for part in differentiate(grad, gate, up, kind) if part is not None]
    results = [torch.empty_like(operand) for operand in (gate, up) if operand is not None]
    if gate.numel():
        matrices = [_matrix(result) for result in results]
        grad_up = matrices[1] if up is not None else None
        backward_into(_matrix(grad), _matrix(gate), None if up is None else _matrix(up), kind, matrices[0], grad_up)
    return results


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    gate, up = ctx.saved_tensors
    grads = gated_activation_backward(grad, gate, up, ctx.kind)
    return grads[0], grads[1] if up is not None else None, None


gated_activation.register_autograd(_differentiate, setup_context=_keep_inputs)


def _matrix(tensor: Tensor) -> Tensor:
    """View as ``[rows, H]``; what has one dimension is one row."""
    return tensor.view(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor


def _suits_kernel(*operands: Tensor | None) -> bool:
    return all(
        operand.dtype in KERNEL_DTYPES and (operand.is_contiguous() or (operand.dim() == 2 and 1 in operand.stride()))
        for operand in operands
        if operand is not None
    )


def _check(gate: Tensor, up: Tensor | None, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}: it must be one of {', '.join(map(repr, KINDS))}.")
    if not gate.is_floating_point() or not gate.dim():
        raise ValueError(f"gate is {gate.dtype} {tuple(gate.shape)}: it must be floating point with a dimension.")
    if (up is None) != (kind == "relu2"):
        raise ValueError(
            f"up is {'missing' if up is None else 'given'}: {kind!r} {'needs' if up is None else 'has no'} up."
        )
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device):
        raise ValueError(
            f"up is {up.dtype} {tuple(up.shape)} on {up.device}: it must be {gate.dtype} {tuple(gate.shape)} on "
            f"{gate.device}, as the gate is."
        )
