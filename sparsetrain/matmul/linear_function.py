"""The autograd function of linear layers with a masked weight, and the gradients of its products."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Product
from ..kernels.tile_codes import unpack_codes
from ..masks.gradient_rules import GradientRule
from .estimated_weight_gradient import estimated_weight_gradient
from .masked_matmul import masked_matmul, multiply_rows
from .operands import Operands
from .tensor_state import Stamp

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias."""

_NO_SECOND_GRADIENT = (
    "backend is {backend!r} and a gradient of gradients is asked for (create_graph=True): only 'masked' has one, so "
    "use backend='masked'."
)


class LinearSpec(NamedTuple):
    """What the autograd functions know beside tensors: the gradient rule, the backends, the seed of draws."""

    gradient: GradientRule
    forward: str
    input_gradient: str
    seed: int


class SparseLinearFunction(torch.autograd.Function):
    """``Y = X·(W⊙M)ᵀ + b``, ``dX = dY·(W⊙M)``, ``dW`` by a gradient rule, ``db = ΣdY``.

    ``forward`` takes the context, because ``setup_context`` has the signature inspected in every call; function
    transforms, which would want it, are handled before.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        codes: Tensor,
        bias: Tensor | None,
        draws: Tensor | None,
        backward_codes: Tensor | None,
        spec: LinearSpec,
    ) -> Tensor:
        """Compute the forward product, and keep what the two gradient products need; W⊙M is not among it."""
        ctx.save_for_backward(input, weight, codes, backward_codes)
        ctx.draws, ctx.spec, ctx.bias_dtype = draws, spec, weight.dtype if bias is None else bias.dtype
        if spec.forward == "masked":
            return F.linear(input, masked_weight(weight, codes), bias)
        rows = input.reshape(-1, weight.shape[1])
        result = masked_matmul(rows, weight, codes, bias, "forward", spec.forward, backward_codes)
        return result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for."""
        wants = ctx.needs_input_grad
        wanted = (wants[0], wants[1], wants[3])
        found = linear_gradients(wanted, output_gradients[0], ctx.saved_tensors, ctx.draws, ctx.spec, ctx.bias_dtype)
        return found[0], found[1], None, found[2], None, None, None


def linear_gradients(
    wanted: tuple[bool, ...],
    output_gradient: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    draws: Tensor | None,
    spec: LinearSpec,
    bias_dtype: torch.dtype,
    operands: Operands | None = None,
    stamp: Stamp | None = None,
    masked: Tensor | None = None,
) -> Gradients:
    """Return the gradients that are wanted, of input, weight and bias.

    What is saved is input, weight, codes, and backward codes or None. Where they are at hand, in eager execution
    without a graph, operands come with their stamp after the forward product, or with the weight of a dense input
    gradient.

    Raises:
        RuntimeError: If a sparse product would have to be differentiated twice.
    """
    input, weight, codes, backward_codes = saved
    if spec.forward != "masked" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(_NO_SECOND_GRADIENT.format(backend=spec.forward))
    input_gradient = weight_gradient = bias_gradient = None
    flat = input.dim() == 2
    rows = output_gradient if flat else output_gradient.reshape(-1, weight.shape[0])  # [tokens, O]
    if wanted[0]:
        if spec.input_gradient == "masked":
            if masked is None:
                masked = masked_weight(weight, codes if backward_codes is None else codes & backward_codes)
            input_gradient = output_gradient.matmul(_in(masked, output_gradient.dtype))
        else:
            product: Product = "input_gradient"
            rest = (rows, weight, codes, None, product, spec.input_gradient, backward_codes)
            found = masked_matmul(*rest) if operands is None else multiply_rows(operands, *rest, stamp)
            input_gradient = found if flat else found.view(input.shape)
    if wanted[1]:
        tokens = input if flat else input.reshape(-1, weight.shape[1])
        weight_gradient = weight_gradient_of(rows, tokens, weight.dtype, codes, draws, spec, operands)
    if wanted[2]:
        bias_gradient = _in(rows.sum(0), bias_dtype)
    return input_gradient, weight_gradient, bias_gradient


def weight_gradient_of(
    rows: Tensor,
    tokens: Tensor,
    dtype: torch.dtype,
    codes: Tensor,
    draws: Tensor | None,
    spec: LinearSpec,
    operands: Operands | None,
) -> Tensor:
    """Return ``dYᵀ·X``, or its estimate, by the gradient rule."""
    if draws is None:
        whole = rows.t().mm(tokens)
    else:
        whole = estimated_weight_gradient(rows, tokens, codes, draws, spec.seed, spec.forward)
    rule = spec.gradient
    if rule.name != "ste":
        if spec.forward != "masked":  # else the rule comes in the product's dtype, as if autocast had cast the weight
            whole = _in(whole, dtype)
        quick = None if rule.name != "masked" else operands
        whole = rule.apply(whole, codes) if quick is None else quick.kept.prune_(whole, codes)
    return whole if whole.dtype is dtype else whole.to(dtype)  # in every backward, so without a call


def masked_weight(weight: Tensor, codes: Tensor) -> Tensor:
    """Return ``W⊙M``, differentiably.

    Example:
        >>> masked_weight(torch.ones(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)).sum().item()
        4.0
    """
    return weight.masked_fill(~unpack_codes(codes), 0)


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # a call that does nothing costs a microsecond
