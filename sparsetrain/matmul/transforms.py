"""Masked products under function transforms and tracers: made of operations that those can take apart.

``torch.func`` (``vmap``, ``jvp``, ``jacfwd``, ``hessian``, …) and forward-mode differentiation take no autograd
function that was not written for them. A sum whose second part is exactly zero gives the same values, and gradients by
rule.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module

from ..kernels.tile_codes import unpack_codes
from ..masks.gradient_rules import GradientRule
from ..masks.matrices import weight_of


def with_gradient_of(value: Tensor, source: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """Return a value whose gradient, and tangent, is that of another tensor times a factor.

    Example:
        >>> torch.func.jvp(lambda x: with_gradient_of(x.sign(), x, 2.0), (torch.ones(1),), (torch.ones(1),))
        (tensor([1.]), tensor([2.]))
    """
    return value.detach() + (source - source.detach()) * factor


def transformed_weight(weight: Tensor, codes: Tensor, rule: GradientRule) -> Tensor:
    """Return ``W⊙M``, shaped like the weight or its matrix, whose gradient follows a rule.

    Example:
        >>> codes = torch.full((1, 1), 0xF, dtype=torch.int16)  # keeps the first of four rows
        >>> transformed_weight(torch.ones(4, 4), codes, GradientRule()).sum().item()
        4.0
    """
    mask = weight_of(unpack_codes(codes), weight.shape)
    factor = torch.where(mask, rule.kept, rule.pruned).to(weight.dtype)
    return with_gradient_of(weight.masked_fill(~mask, 0), weight, factor)


def transformed_linear(
    input: Tensor,
    weight: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    backward_codes: Tensor | None,
    rule: GradientRule,
) -> Tensor:
    """Return what :func:`sparsetrain.sparse_linear` does; its weight gradient is exact, never estimated."""
    masked = transformed_weight(weight, codes, rule)
    if backward_codes is None:
        return F.linear(input, masked, bias)
    backward = weight.detach().masked_fill(~unpack_codes(codes & backward_codes), 0)
    return with_gradient_of_input(F.linear(input.detach(), masked, bias), F.linear(input, backward))


def with_gradient_of_input(output: Tensor, other: Tensor) -> Tensor:
    """Return an output, with its gradients, and those of another output beside them."""
    return output + (other - other.detach())


def as_constants(adapter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return an adapter as ``torch.jit.trace`` takes it, as its parts are no parameters of the module."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return adapter
    down, up = adapter
    return down.data, up.data  # detach() would be traced


def as_leaf(layer: Module, input: Proxy) -> Tensor:
    """Leave a layer whole in the graph of ``torch.fx``, so that the graph follows its phase and mask."""
    tracer = input.tracer
    name = tracer.path_of_module(layer)  # type: ignore[attr-defined]
    return cast(Tensor, tracer.create_proxy("call_module", name, (input,), {}))
