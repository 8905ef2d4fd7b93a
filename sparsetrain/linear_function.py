"""The autograd functions of linear layers with a masked weight: one that can be compiled, and a quick one."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import is_eager
from .estimated_gradient import estimated_weight_gradient
from .gradient_rules import GradientRule
from .kernels.tile_codes.reference import unpack_codes
from .operands import Operands, Stamp
from .products import masked_product, multiply_rows

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of input, weight and bias."""


class Rules(NamedTuple):
    """What the autograd functions know beside tensors: the gradient rule, who computes what, the seed of draws."""

    gradient: GradientRule
    forward: str
    input_gradient: str
    seed: int


class Call:
    """What a product in eager execution has at hand of its layer, so that it need not look for it.

    Args:
        operands: Of the layer.
        codes: int16 ``[O/4, I/4]``.
        backward_codes: The same, or None.
        draws: Counter of a random estimate, or None.
        rules: As in the other function.
    """

    __slots__ = ("_masked_backward", "_version", "backward_codes", "codes", "draws", "masked", "operands", "rules",
                 "stamp")  # fmt: skip

    def __init__(
        self, operands: Operands, codes: Tensor, backward_codes: Tensor | None, draws: Tensor | None, rules: Rules
    ) -> None:
        self.operands, self.codes, self.backward_codes = operands, codes, backward_codes
        self.draws, self.rules = draws, rules
        self.stamp: Stamp | None = None  # of the operands that the forward product found
        self.masked: Tensor | None = None
        self._masked_backward: Tensor | None = None

    def keep(self, masked: Tensor, masked_backward: Tensor) -> None:
        """Take the masked weights that the forward and the input gradient's product multiply by, if they are dense."""
        self.masked, self._masked_backward, self._version = masked, masked_backward, masked_backward._version

    @property
    def masked_backward(self) -> Tensor | None:
        """The masked weight of the input gradient's product, unless it was renewed since."""
        kept = self._masked_backward
        return kept if kept is not None and kept._version == self._version else None


class SparseLinearFunction(torch.autograd.Function):
    """``Y = X·(W⊙M)ᵀ + b``, ``dX = dY·(W⊙M)``, ``dW`` by a gradient rule, ``db = ΣdY``.

    ``forward`` takes the context, because ``setup_context`` has the signature inspected in every call; function
    transforms, which would want it, are handled before.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, codes: Tensor, bias: Tensor | None, draws: Tensor | None,
        backward_codes: Tensor | None, rules: Rules,
    ) -> Tensor:  # fmt: skip
        """Compute the forward product, and keep what the two gradient products need; W⊙M is not among it."""
        ctx.save_for_backward(input, weight, codes, backward_codes)
        ctx.draws, ctx.rules, ctx.bias_dtype = draws, rules, None if bias is None else bias.dtype
        if rules.forward == "masked":
            return F.linear(input, masked_weight(weight, codes), bias)
        rows = input.reshape(-1, weight.shape[1])
        result = masked_product(rows, weight, codes, bias, False, rules.forward, backward_codes)
        return result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for."""
        wants = ctx.needs_input_grad
        wanted = (wants[0], wants[1], wants[3])
        found = _gradients(wanted, output_gradients[0], ctx.saved_tensors, ctx.draws, ctx.rules, ctx.bias_dtype)
        return found[0], found[1], None, found[2], None, None, None


class EagerLinearFunction(torch.autograd.Function):
    """What :class:`SparseLinearFunction` computes, with few arguments and what its layer has at hand."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
        """Compute the forward product."""
        codes, backward_codes = call.codes, call.backward_codes
        ctx.save_for_backward(input, weight, codes, backward_codes)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        if call.masked is not None:
            return F.linear(input, call.masked, bias)
        flat = input.dim() == 2
        rows = input if flat else input.reshape(-1, weight.shape[1])
        name = call.rules.forward
        result = multiply_rows(call.operands, rows, weight, codes, bias, False, name, backward_codes)
        call.stamp = call.operands.stamp
        return result if flat else result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for."""
        call: Call = ctx.call
        found = _gradients(
            ctx.needs_input_grad, output_gradients[0], ctx.saved_tensors, call.draws, call.rules, ctx.bias_dtype, call
        )
        return *found, None


def _gradients(
    wanted: tuple[bool, ...], output_gradient: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    draws: Tensor | None, rules: Rules, bias_dtype: torch.dtype, call: Call | None = None,
) -> Gradients:  # fmt: skip
    input, weight, codes, backward_codes = saved
    differentiable = torch.is_grad_enabled()
    if rules.forward != "masked" and differentiable and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"backend is {rules.forward!r} and a gradient of gradients is asked for (create_graph=True): only "
            "'masked' has one, so use backend='masked'."
        )
    # what is at hand has no part in a graph of gradients, nor where something follows the operations
    call = None if differentiable or call is None or not is_eager(output_gradient) else call
    input_gradient = weight_gradient = bias_gradient = None
    flat = input.dim() == 2
    rows = output_gradient if flat else output_gradient.reshape(-1, weight.shape[0])  # [tokens, O]
    if wanted[0]:
        if rules.input_gradient == "masked":
            masked = None if call is None else call.masked_backward
            if masked is None:
                masked = masked_weight(weight, codes if backward_codes is None else codes & backward_codes)
            input_gradient = output_gradient.matmul(_in(masked, output_gradient.dtype))
        else:
            rest = (rows, weight, codes, None, True, rules.input_gradient, backward_codes)
            product = masked_product(*rest) if call is None else multiply_rows(call.operands, *rest, call.stamp)
            input_gradient = product if flat else product.view(input.shape)
    if wanted[1]:
        tokens = input if flat else input.reshape(-1, weight.shape[1])
        if draws is None:
            whole = rows.t().mm(tokens)
        else:
            whole = estimated_weight_gradient(rows, tokens, codes, draws, rules.seed, rules.forward)
        if (
            rules.forward != "masked"
        ):  # whose rule comes in the dtype of the product, as if autocast had cast the weight
            whole = _in(whole, weight.dtype)
        if call is not None and rules.gradient.name == "masked":
            whole = call.operands.kept.prune_(whole, codes)
        else:
            whole = rules.gradient.apply(whole, codes)
        weight_gradient = _in(whole, weight.dtype)
    if wanted[2]:
        bias_gradient = _in(rows.sum(0), bias_dtype)
    return input_gradient, weight_gradient, bias_gradient


def masked_weight(weight: Tensor, codes: Tensor) -> Tensor:
    """Return ``W⊙M``, differentiably.

    Example:
        >>> masked_weight(torch.ones(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)).sum().item()
        4.0
    """
    return weight.masked_fill(~unpack_codes(codes), 0)


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # a call that does nothing costs a microsecond
