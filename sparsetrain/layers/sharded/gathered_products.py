"""Products with a weight that FSDP2 has gathered, in which masks are written as zeros."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...distributed.shards import held
from ...kernels.tile_codes import pack_codes
from ...masks.gradient_rules import GradientRule
from ...matmul.transforms import as_constants
from ..functional import sparse_linear
from ..masked_layer import MaskedLayer


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


def gathered_weight(layer: MaskedLayer, weight: Tensor) -> Tensor:
    """Return the gathered weight of a layer whose mask is in force, or its part here, with gradients by its rule.

    Raises:
        RuntimeError: If it was gathered without its mask.
    """
    assert layer.shard is not None
    layer.shard.require_fresh()
    return under_rule(weight, layer.gradient)


def multiply_gathered(layer: MaskedLayer, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply tokens ``[..., K]`` by a gathered layer's matrix, or its part here, and add a bias: ``[..., O]``."""
    matrix = layer.as_matrix(gathered_weight(layer, weight))
    if layer.draws is None:
        return F.linear(input, matrix, bias)
    return sparse_linear(
        input, matrix, codes_in(matrix.detach()), bias, gradient=layer.gradient, backend="masked", draws=layer.draws,
        seed=layer.execution.seed,
    )  # fmt: skip


def gathered_linear(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply tokens ``[..., K]`` by a gathered layer's matrix, add bias and adapter: ``[..., O]``."""
    output = multiply_gathered(layer, input, layer.weight, layer.bias)
    if layer.adapter is None:
        return output
    down, up = map(held, as_constants(layer.adapter))
    return output + F.linear(F.linear(input, down), up)
