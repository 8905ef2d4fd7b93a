"""The quick way through a masked linear layer in eager execution: what its products need is found out once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import BACKENDS
from ..masks.gradient_rules import resolve_gradient_rule
from ..matmul.autocast import as_autocast, autocast_dtype
from ..matmul.choices import backend_on
from ..matmul.eager import is_eager, is_plain
from ..matmul.kept_weight import may_keep
from ..matmul.linear_function import LinearSpec, linear_gradients
from ..matmul.masked_matmul import multiply_rows
from ..matmul.operands import Operands
from .masked_layer import MaskedLayer

DEVICES = ("cpu", "cuda")

Held = tuple[Tensor, Tensor, Tensor | None]
"""A weight, the tensor of it that has a graph, and the bias."""


class Call:
    """What products of a layer have at hand of it, as long as its tensors and settings are these very objects.

    Args:
        layer: Whose ``backward_codes``, ``soft_scale`` and others are settled.
        weight: Of the layer.
        columns: K, of its matrix.
        device: Type of the device of weight and inputs.
        backend: A backend's name, or ``"auto"``.
    """

    __slots__ = (
        "backward_codes",
        "codes",
        "columns",
        "device",
        "draws",
        "execution",
        "gradient",
        "is_2_4",
        "operands",
        "shape",
        "spec",
        "weight",
    )

    def __init__(self, layer: MaskedLayer, weight: Tensor, columns: int, device: str, backend: str) -> None:
        self.weight, self.shape, self.columns = weight, weight.shape, columns
        self.codes, self.backward_codes, self.draws = layer.mask_codes, layer.backward_codes, layer.draws
        self.gradient, self.execution, self.is_2_4 = layer.gradient, layer.execution, layer.is_2_4
        self.operands, self.device = layer.operands, device
        transposable = self.execution.transposable or self.backward_codes is not None
        rule = resolve_gradient_rule(self.gradient)
        self.spec = LinearSpec(rule, backend, backend if transposable else "masked", self.execution.seed)

    def is_of(self, layer: dict[str, Any], weight: Tensor | None) -> bool:
        """Say whether this is of a layer, given its ``__dict__``, and weight as they are now."""
        return (
            self.weight is weight
            and self.codes is layer["mask_codes"]
            and self.gradient is layer["gradient"]
            and self.is_2_4 is layer["is_2_4"]
            and self.backward_codes is layer["backward_codes"]
            and self.draws is layer["draws"]
            and self.execution is layer["execution"]
            and layer["soft_scale"] is None
            and weight.shape == self.shape
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(None), ()  # a copied or loaded layer finds out for itself


class EagerLinearFunction(torch.autograd.Function):
    """What :class:`SparseLinearFunction` computes, with few arguments and what its layer has at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        masked: Tensor | None,
        masked_backward: Tensor | None,
        call: Call,
    ) -> Tensor:
        """Compute the forward product.

        Args:
            ctx: Of the function.
            input: ``[..., K]``.
            weight: ``[O, K]``, the master.
            bias: ``[O]`` or None.
            masked: ``W⊙M`` that dense products multiply by; None if they are not dense.
            masked_backward: The same for the input gradient's product, which may be pruned further.
            call: Of the layer.
        """
        codes, backward_codes = call.codes, call.backward_codes
        ctx.save_for_backward(input, weight, codes, backward_codes)
        bias_dtype = weight.dtype if bias is None else bias.dtype
        if masked is not None and masked_backward is not None:
            ctx.at_hand = call, bias_dtype, None, masked_backward, masked_backward._version
            return F.linear(input, masked, bias)
        flat = input.dim() == 2
        rows = input if flat else input.reshape(-1, weight.shape[1])
        operands = call.operands
        result = multiply_rows(operands, rows, weight, codes, bias, "forward", call.spec.forward, backward_codes)
        ctx.at_hand = call, bias_dtype, operands.stamp, None, 0  # in one, as attributes take long to be set
        return result if flat else result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for."""
        call, bias_dtype, stamp, masked, version = ctx.at_hand
        output_gradient: Tensor = output_gradients[0]
        operands: Operands | None = call.operands
        # what is at hand has no part in a graph of gradients, nor where something follows the operations
        if torch.is_grad_enabled() or not is_eager(output_gradient):
            operands = masked = None
        elif masked is not None and masked._version != version:
            masked = None
        found = linear_gradients(
            ctx.needs_input_grad,
            output_gradient,
            ctx.saved_tensors,
            call.draws,
            call.spec,
            bias_dtype,
            operands,
            stamp,
            masked,
        )
        return *found, None, None, None


_apply: Callable[..., Tensor] = super(torch.autograd.Function, EagerLinearFunction).apply
"""What ``Function.apply`` calls after its look at function transforms, of which there are none in eager execution."""


def eager_product(layer: MaskedLayer, input: Tensor, held: Held | None = None) -> Tensor | None:
    """Return a layer's product, without what :func:`sparse_linear` has to find out first; None if it has to.

    Every check here costs next to nothing, and ``nn.Module`` finds parameters slowly.

    Args:
        layer: Whose mask is in force.
        input: ``[..., K]``, of which :func:`is_eager` is true.
        held: Parts of the parameters, where those are spread over processes.
    """
    weight: Tensor | None
    source: Tensor | None
    bias: Tensor | None
    if held is None:
        parameters = layer._parameters
        weight = source = parameters.get("weight")
        bias = parameters.get("bias")
    else:
        weight, source, bias = held
    call = layer.eager_call
    if not isinstance(call, Call) or not call.is_of(layer.__dict__, weight):
        layer.eager_call = call = _call(layer, weight)
    if call is None or weight is None or source is None:
        return None
    if input.is_nested or not input.dim() or input.size(-1) != call.columns:
        return None
    device, name = call.device, call.spec.forward
    if not (input.is_cuda if device == "cuda" else input.is_cpu):
        return None
    by_autocast = torch.is_autocast_enabled(device)
    if by_autocast:
        input = as_autocast(input)
    elif name != "masked" and input.dtype is not weight.dtype:
        return None
    matrix = layer.as_matrix(source) if layer.transposed or len(call.shape) != 2 else source
    masked = masked_backward = None
    if name == "masked":
        if not may_keep(weight):
            return None
        kept, dtype = call.operands.kept, weight.dtype
        if by_autocast:
            dtype, bias = autocast_dtype(weight), None if bias is None else as_autocast(bias)
        masked = masked_backward = kept.get(weight, matrix, call.codes, None, dtype)
        if call.backward_codes is not None:
            masked_backward = kept.get(weight, matrix, call.codes, call.backward_codes, dtype)
    return _apply(input, matrix, bias, masked, masked_backward, call)


def _call(layer: MaskedLayer, weight: Tensor | None) -> Call | None:
    """Return what quick products of a layer need, or None if it has none as it is now."""
    codes, device = layer.mask_codes, "" if weight is None else weight.device.type
    if weight is None or not is_plain(weight) or layer.soft_scale is not None or device not in DEVICES:
        return None
    rows, columns = layer.matrix.shape
    if codes.dtype is not torch.int16 or codes.shape != (rows // 4, columns // 4) or rows % 4 or columns % 4:
        return None
    name = backend_on(device, layer.execution.backend) if layer.is_2_4 else "masked"
    if name != "auto" and name not in BACKENDS:
        return None
    return Call(layer, weight, columns, device, name)
