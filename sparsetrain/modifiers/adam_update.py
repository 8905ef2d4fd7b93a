"""Adam's update where second moments are frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import gradient_here, local
from ..kernels.torch_internals import (
    foreach_add,
    foreach_add_,
    foreach_addcdiv_,
    foreach_div_,
    foreach_lerp_,
    foreach_mul_,
    foreach_neg,
    foreach_pow,
    foreach_sqrt_,
    foreach_sub_,
)

UNHEARD_OF = 10.0
"""Times the root of an entry's frozen moment: a larger gradient shows that the moment had not settled."""


@dataclass
class Frozen:
    """What is known of a parameter's frozen second moment.

    Args:
        correction: ``1 - β₂ᵀ``, by which Adam divides the moment after the parameter's T steps.
        going: bool, shaped like the moment (complex as pairs): where Adam goes on.
    """

    correction: float
    going: Tensor


@torch.no_grad()
def update_(
    parameters: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    frozen: Sequence[Frozen],
    group: Mapping[str, Any],
) -> None:
    """Update parameters, their moments and their counts.

    Args:
        parameters: With gradients, on one device and in one dtype.
        states: Adam's: ``exp_avg`` and ``step`` are updated, and ``exp_avg_sq`` where Adam goes on.
        frozen: Of each; where a gradient is unheard of, Adam goes on from now.
        group: Adam's options.
    """
    weights = _real([local(parameter) for parameter in parameters])
    averages, squares = (_real([local(state[name]) for state in states]) for name in ("exp_avg", "exp_avg_sq"))
    counts, (beta, beta2) = [state["step"] for state in states], map(float, group["betas"])
    rate = _rate(group, weights[0].device)
    gradients = _decayed(parameters, weights, rate, group)
    foreach_add_(counts, 1)
    foreach_lerp_(averages, gradients, 1 - beta)
    # a capturable step reads nothing from the device
    numbers = [count if group["capturable"] else float(count) for count in counts]
    each = zip(squares, gradients, numbers, frozen, strict=True)
    divisors = [_second_moment_(*entry, beta=beta2) for entry in each]
    foreach_sqrt_(divisors)
    foreach_add_(divisors, group["eps"])
    if not group["capturable"]:
        foreach_addcdiv_(weights, averages, divisors, [-rate / (1 - beta**number) for number in numbers])
        return
    scales = foreach_pow(beta, counts)
    foreach_sub_(scales, 1)
    foreach_div_(scales, rate)
    foreach_mul_(divisors, scales)
    foreach_addcdiv_(weights, averages, divisors)


def _rate(group: Mapping[str, Any], device: torch.device) -> Any:
    """Return the learning rate: a number, or a scalar on the device if the step is capturable."""
    rate = group["lr"]
    if not group["capturable"]:
        return float(rate)
    return rate.to(device).squeeze() if isinstance(rate, Tensor) else rate


def _decayed(parameters: Sequence[Tensor], weights: list[Tensor], rate: Any, group: Mapping[str, Any]) -> list[Tensor]:
    """Return gradients to descend, with the weight decay in them; a decoupled one is done to the weights."""
    gradients = _real([gradient for gradient in map(gradient_here, parameters) if gradient is not None])
    decay = group["weight_decay"]
    if group["maximize"]:
        gradients = list(foreach_neg(gradients))
    if decay and group["decoupled_weight_decay"]:
        foreach_mul_(weights, 1 - rate * decay)
    elif decay:
        gradients = list(foreach_add(gradients, weights, alpha=decay))
    return gradients


def _second_moment_(square: Tensor, gradient: Tensor, count: Tensor | float, frozen: Frozen, *, beta: float) -> Tensor:
    """Update ``square`` where Adam goes on, and return the corrected second moment of the step."""
    share = gradient.square().mul_(1 - beta)
    limit = UNHEARD_OF**2 * (1 - beta) / frozen.correction
    starts = (share > limit * square).logical_and_(~frozen.going)
    frozen.going.logical_or_(starts)
    before, now = 1 - beta ** (count - 1), 1 - beta**count
    # as if v* had stood until the step before
    begun = torch.where(starts, square * (before / frozen.correction), square)
    square.copy_(torch.where(frozen.going, begun * beta + share, square))
    return torch.where(frozen.going, square / now, square / frozen.correction)


def nowhere(parameter: Tensor) -> Tensor:
    """Return False for every entry of a parameter, as of a pair for every complex one."""
    return torch.zeros_like(_real([local(parameter.detach())])[0], dtype=torch.bool)


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
