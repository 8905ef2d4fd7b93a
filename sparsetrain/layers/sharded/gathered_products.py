"""Products with a weight that FSDP2 has gathered, in which masks are written as zeros."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...distributed.shards import local, to_local
from ...kernels.tile_codes import pack_codes
from ...masks.gradient_rules import GradientRule
from ...matmul.autocast import as_autocast
from ...matmul.linear_function import LinearSpec
from ...matmul.transforms import as_constants
from ...matmul.wire_matmul import WireLinearFunction
from ..functional import sparse_linear
from ..masked_layer import MaskedLayer
from .wires import DoublePrunedWire, PackedWire


def kept_in(weight: Tensor) -> Tensor:
    """Return which entries of a gathered weight are kept, bool: all but those that are -0.

    Example:
        >>> kept_in(torch.tensor([0.0, -0.0, 2.0])).tolist()
        [True, False, True]
    """
    return ~(weight == 0).logical_and_(weight.signbit())


def codes_in(matrix: Tensor) -> Tensor:
    """Return the tile codes ``[O/4, K/4]`` of a gathered weight's matrix ``[O, K]``.

    Example:
        >>> codes_in(torch.tensor([[1.0, -0.0, -0.0, 2.0]] * 4)).tolist()
        [[-26215]]
    """
    return pack_codes(kept_in(matrix))


class UnderRule(torch.autograd.Function):
    """A gathered weight as it is; backward, the gradient by a gradient rule."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rule: GradientRule) -> Tensor:
        """Return the weight."""
        ctx.save_for_backward(weight)
        ctx.rule = rule
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """Return the gradient of the master."""
        kept, gradient = kept_in(ctx.saved_tensors[0]), gradients[0]
        if ctx.rule.name == "masked":
            return gradient.masked_fill(~kept, 0), None
        return (gradient * ctx.rule.kept).where(kept, gradient * ctx.rule.pruned), None


def under_rule(weight: Tensor, rule: GradientRule) -> Tensor:
    """Return a gathered weight whose gradient follows a rule."""
    return weight if rule.name == "ste" else cast(Tensor, UnderRule.apply(weight, rule))  # type: ignore[no-untyped-call]


def gathered_weight(layer: MaskedLayer, weight: Tensor, rule: GradientRule | None = None) -> Tensor:
    """Return the gathered weight of a layer whose mask is in force, with gradients by a rule; None for all of them.

    Args:
        layer: Whose weight it is.
        weight: It, or the part of it that tensor parallelism leaves here.
        rule: Of the gradient.

    Raises:
        RuntimeError: If it was gathered without its mask.
    """
    assert layer.shard is not None
    layer.shard.require_fresh()
    return weight if rule is None else under_rule(weight, rule)


def gathered_backward_codes(layer: MaskedLayer) -> Tensor | None:
    """Return the gathered codes by which the input gradient's weight is pruned further, if there are any."""
    wire = None if layer.shard is None else layer.shard.wire
    if layer.backward_codes is None:
        return None
    if not isinstance(wire, DoublePrunedWire) or wire.codes is None:
        raise RuntimeError(
            f"layer {layer.shard and layer.shard.name!r} prunes its input gradient further, but was gathered without "
            "the codes of that: make the run after fully_shard."
        )
    return wire.codes[: layer.as_matrix(local(layer.weight)).shape[0] // 4]


def multiply_gathered(
    layer: MaskedLayer, input: Tensor, weight: Tensor, bias: Tensor | None, number: int = 0
) -> Tensor:
    """Multiply tokens ``[..., K]`` by a gathered layer's matrix, or its part here, and add a bias: ``[..., O]``.

    Args:
        layer: Whose weight it is.
        input: Plain.
        weight: What was gathered, or the part of it that tensor parallelism leaves here.
        bias: Of the same part, plain, or None.
        number: Of the part, among those that make random draws of their own.
    """
    if layer.shard is not None and isinstance(layer.shard.wire, PackedWire):
        return multiply_packed(layer, layer.shard.wire, input, weight, bias, number)
    backward_codes = gathered_backward_codes(layer)
    if layer.draws is None and backward_codes is None:
        return F.linear(input, layer.as_matrix(gathered_weight(layer, weight, layer.gradient)), bias)
    matrix = layer.as_matrix(gathered_weight(layer, weight))
    return sparse_linear(
        input, matrix, codes_in(matrix.detach()), bias, gradient=layer.gradient, backend="masked", draws=layer.draws,
        seed=layer.execution.seed + number, backward_codes=backward_codes,
    )  # fmt: skip


def multiply_packed(
    layer: MaskedLayer, wire: PackedWire, input: Tensor, weight: Tensor, bias: Tensor | None, number: int
) -> Tensor:
    """Do what :func:`multiply_gathered` does with a weight that came packed, of which only the shape is there."""
    values, backend = wire.values, layer.backend
    assert values is not None
    if torch.is_autocast_enabled(input.device.type):
        input = as_autocast(input)
    elif input.dtype != values.dtype:
        raise ValueError(
            f"input is {input.dtype} but the weight of layer {layer.shard and layer.shard.name!r} was gathered in "
            f"{values.dtype}: they must be alike outside of autocast, so cast one of them or use autocast."
        )
    spec = LinearSpec(layer.gradient, backend, backend, layer.execution.seed + number)
    given = input, gathered_weight(layer, weight), values, wire.numbers, layer.mask_codes, bias, layer.draws, spec
    return cast(Tensor, WireLinearFunction.apply(*given))  # type: ignore[no-untyped-call]


def gathered_linear(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply tokens ``[..., K]`` by a gathered layer's matrix, add bias and adapter: ``[..., O]``."""
    output = multiply_gathered(layer, input, layer.weight, layer.bias)
    if layer.adapter is None:
        return output
    down, up = map(to_local, as_constants(layer.adapter))
    return output + F.linear(F.linear(input, down), up)
