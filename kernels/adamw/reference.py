"""AdamW with a rule for masked entries, in plain torch: the sums of ``torch.optim.AdamW`` in its order."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..masked_update.reference import add_masked_decay_, apply_mask_

Rule = Literal["none", "decay_gradient", "decay_weight", "mask_gradient", "shrink_weight"]
"""What the mask does before the update: nothing, ``g += λ·(1-M)⊙W``, ``W -= lr·λ·(1-M)⊙W``, ``g ⊙= M``, or
``W -= λ·(1-M)⊙W``."""

RULES: tuple[Rule, ...] = ("none", "decay_gradient", "decay_weight", "mask_gradient", "shrink_weight")


class Factors(NamedTuple):
    """The numbers of a step, in float64.

    Args:
        shrink: ``1 - lr·weight_decay``, times the weight.
        share: ``1 - β₁``, of the gradient in the first moment.
        fading: ``β₂``, times the second moment.
        square_share: ``1 - β₂``, of the squared gradient.
        correction: ``√(1 - β₂ᵗ)``.
        epsilon: ``ε``.
        step_size: ``-lr / (1 - β₁ᵗ)``.
    """

    shrink: float
    share: float
    fading: float
    square_share: float
    correction: float
    epsilon: float
    step_size: float


def factors(lr: float, beta1: float, beta2: float, epsilon: float, weight_decay: float, step: float) -> Factors:
    """Return the numbers of step ``step``, from 1 up.

    Example:
        >>> factors(0.5, 0.75, 0.75, 1e-8, 0.5, 1)
        Factors(shrink=0.75, share=0.25, fading=0.75, square_share=0.25, correction=0.5, epsilon=1e-08, step_size=-2.0)
    """
    return Factors(
        1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, epsilon, -lr / (1 - beta1**step)
    )


@torch.no_grad()
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    codes: Tensor,
    numbers: Factors,
    rule: Rule = "none",
    decay: float = 0.0,
    *,
    zeros: bool = False,
    maximize: bool = False,
    number: int = 0,
    clock: int = 0,
) -> None:
    """Update a weight and its moments in place; the gradient stays as it is.

    Args:
        weight: ``[O, I]``, changed.
        gradient: ``[O, I]`` in the weight's dtype.
        exp_avg: First moment, like the weight; changed.
        exp_avg_sq: Second moment; changed.
        codes: int16 ``[O/4, I/4]``.
        numbers: Of the step.
        rule: What the mask does before the update.
        decay: What the rule adds times pruned weights: λ to gradients, ``-lr·λ`` or ``-λ`` to weights.
        zeros: Write zeros into what is pruned of the weight, after the update.
        maximize: Follow the gradient upwards.
        number: Of the layer, with ``clock`` the counter of the random numbers that round a decay in 16 bits.
        clock: Of the step.

    Example:
        >>> weight, moments = torch.ones(4, 4), torch.zeros(2, 4, 4)
        >>> codes = torch.full((1, 1), 0x000F, dtype=torch.int16)  # keeps the first row
        >>> adamw_(weight, torch.ones(4, 4), *moments, codes, factors(0.5, 0.75, 0.75, 0.0, 0.0, 1), zeros=True)
        >>> weight[:, 0].tolist()
        [0.5, 0.0, 0.0, 0.0]

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv 1711.05101.
    """
    gradient = follow_rule_(weight, gradient, codes, rule, decay, number, clock)
    if maximize:
        gradient = -gradient
    if numbers.shrink != 1:
        weight.mul_(numbers.shrink)
    exp_avg.lerp_(gradient, numbers.share)
    exp_avg_sq.mul_(numbers.fading).addcmul_(gradient, gradient, value=numbers.square_share)
    divisor = exp_avg_sq.sqrt().div_(numbers.correction).add_(numbers.epsilon)
    weight.addcdiv_(exp_avg, divisor, value=numbers.step_size)
    if zeros:
        apply_mask_(weight, codes)


def follow_rule_(
    weight: Tensor, gradient: Tensor, codes: Tensor, rule: Rule, decay: float, number: int, clock: int
) -> Tensor:
    """Do what the mask does before the update, as in :func:`adamw_`, and return the gradient that it follows.

    Example:
        >>> codes = torch.full((1, 1), 0x000F, dtype=torch.int16)  # keeps the first row
        >>> follow_rule_(torch.ones(4, 4), torch.ones(4, 4), codes, "decay_gradient", 0.5, 0, 0)[:, 0].tolist()
        [1.0, 1.5, 1.5, 1.5]
    """
    if rule == "decay_gradient":
        return add_masked_decay_(gradient.clone(), weight, codes, decay, number, clock)
    if rule in ("decay_weight", "shrink_weight"):
        add_masked_decay_(weight, weight, codes, decay, number, clock)
    elif rule == "mask_gradient":
        return apply_mask_(gradient.clone(), codes)
    return gradient
