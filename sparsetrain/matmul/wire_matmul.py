"""Products with a weight that came packed over the wire, without a dense weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import BACKENDS
from ..dispatch import MASKED, Product
from ..kernels.torch_internals import unsafe_view
from ..kernels.wire import codes_of_numbers, from_wire
from .choices import choose, fall_back_to_dense
from .execution import Execution
from .linear_function import LinearSpec, weight_gradient_of
from .masked_matmul import LIBRARY
from .operands import Operands
from .registry import operands_of
from .wire_operands import WireOperands

LIBRARY.define(  # type: ignore[no-untyped-call]
    "wire_matmul(Tensor tokens, Tensor values, Tensor numbers, Tensor codes, Tensor? bias, str product, str backend) "
    "-> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def wire_matmul(
    tokens: Tensor,
    values: Tensor,
    numbers: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
    product: Product = "forward",
    backend: str = "auto",
) -> Tensor:
    """Return what :func:`~sparsetrain.matmul.masked_matmul.masked_matmul` does, of a weight that came over the wire.

    Args:
        tokens: ``[..., I]``, or ``[..., O]`` for the input gradient; in the dtype of the product.
        values: ``[O, I/2]``, of the wire.
        numbers: uint8 ``[O/4, I/4]``, of the wire.
        codes: int16, those by which the layer's decisions are found; they are not read.
        bias: ``[O]`` or None, in any dtype.
        product: ``"forward"`` or ``"input_gradient"``.
        backend: A backend's name, or ``"auto"``.

    Returns:
        ``[..., O]``, or ``[..., I]`` for the input gradient, in the dtype of ``tokens``.

    Example:
        >>> values, numbers = torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.uint8)
        >>> wire_matmul(torch.ones(1, 4), values, numbers, torch.zeros(1, 1, dtype=torch.int16)).tolist()
        [[2.0, 2.0, 2.0, 2.0]]
    """
    result: Tensor = torch.ops.sparsetrain.wire_matmul(tokens, values, numbers, codes, bias, product, backend)
    return result


def _multiply(
    tokens: Tensor,
    values: Tensor,
    numbers: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    product: Product,
    backend: str,
) -> Tensor:
    rows = tokens.reshape(-1, tokens.shape[-1])
    size = *tokens.shape[:-1], 2 * values.shape[1] if product == "input_gradient" else values.shape[0]
    operands = operands_of(codes) or Operands(Execution(backend))
    wired = operands.wired or WireOperands([])
    shape = values.shape[0], 2 * values.shape[1]
    choice = choose(operands, rows, shape, bias is not None, product, backend)
    added = bias if bias is None else bias.to(rows.dtype)
    if choice.backend != MASKED.backend:
        chosen = BACKENDS[choice.backend]
        try:
            operand = wired.get(values, numbers, chosen, product, rows.dtype)
            product_rows = chosen.product(operand, rows, added, choice.algorithm)
            return product_rows if tokens.dim() == 2 else unsafe_view(product_rows, size)
        except RuntimeError as error:
            if backend != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            fall_back_to_dense(operands, rows, bias is not None, product, choice, error)
    dense = from_wire(values, numbers).to(rows.dtype)
    return F.linear(tokens, dense if product == "forward" else dense.t(), added)


def _shape_of_product(
    tokens: Tensor,
    values: Tensor,
    numbers: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    product: Product,
    backend: str,
) -> Tensor:
    columns = 2 * values.shape[1] if product == "input_gradient" else values.shape[0]
    return tokens.new_empty(*tokens.shape[:-1], columns)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("wire_matmul", _multiply, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("sparsetrain::wire_matmul", _shape_of_product, lib=LIBRARY)


NO_SECOND_GRADIENT = (
    "gather is 'packed' and a gradient of gradients is asked for (create_graph=True): only a weight that travels "
    "masked has one, so use gather='masked'."
)


class WireLinearFunction(torch.autograd.Function):
    """What :class:`~sparsetrain.matmul.linear_function.SparseLinearFunction` computes, of a weight over the wire."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        values: Tensor,
        numbers: Tensor,
        codes: Tensor,
        bias: Tensor | None,
        draws: Tensor | None,
        spec: LinearSpec,
    ) -> Tensor:
        """Compute the forward product; the weight, of which only the shape is there, is whose gradient is wanted."""
        ctx.save_for_backward(input, values, numbers, codes)
        ctx.draws, ctx.spec, ctx.bias_dtype = draws, spec, weight.dtype if bias is None else bias.dtype
        ctx.weight_dtype = weight.dtype
        return wire_matmul(input, values, numbers, codes, bias, "forward", spec.forward)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for; none of them has another."""
        input, values, numbers, codes = ctx.saved_tensors
        spec, output_gradient = ctx.spec, gradients[0]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(NO_SECOND_GRADIENT)
        input_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            wire = values, numbers, codes
            input_gradient = wire_matmul(output_gradient, *wire, None, "input_gradient", spec.input_gradient)
        rows = output_gradient.reshape(-1, values.shape[0])
        if ctx.needs_input_grad[1]:
            tokens = input.reshape(-1, input.shape[-1])
            own = codes if spec.gradient.name == "ste" else codes_of_numbers(numbers)
            weight_gradient = weight_gradient_of(rows, tokens, ctx.weight_dtype, own, ctx.draws, spec, None)
        if ctx.needs_input_grad[5]:
            bias_gradient = rows.sum(0).to(ctx.bias_dtype)
        return input_gradient, weight_gradient, None, None, None, bias_gradient, None, None
