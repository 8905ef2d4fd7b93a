"""AdamW of several weights with masks as a torch operator: Triton on CUDA, the reference elsewhere."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..pack import Side, pack_tiles_
from ..pack.arguments import sides_of
from .reference import RULES, Factors, Rule, adamw_, factors

DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op(
    "sparsetrain::sparse_adamw_",
    mutates_args={"weights", "exp_avgs", "exp_avg_sqs", "values", "meta", "values_t", "meta_t"},
)
def sparse_adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: float,
    orders: Sequence[int] | None = None,
    rule: str = "none",
    decay: float = 0.0,
    zeros: bool = False,
    maximize: bool = False,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
) -> None:
    """Do a step of AdamW with several weights, and pack them; on CUDA, one launch for each layout among them.

    Args:
        weights: float32 or bfloat16 ``[O, I]``, each; changed.
        gradients: Like the weights; left as they are.
        exp_avgs: First moments, like the weights; changed.
        exp_avg_sqs: Second moments; changed.
        codes: int16 ``[O/4, I/4]``, contiguous, each.
        values: Where the updated weights are packed, as in :func:`..pack.operator.pack_tiles_`; or an empty list.
        meta: The same.
        values_t: Of the transposes; or an empty list.
        meta_t: The same.
        tables: As there.
        lr: Learning rate.
        beta1: Of the first moment.
        beta2: Of the second moment.
        epsilon: Added to the root of the second moment.
        weight_decay: Of every entry, decoupled.
        step: Number of this step, from 1 up.
        orders: Of metadata, as there.
        rule: What masks do before the update: one of :data:`.reference.RULES`.
        decay: λ of the rule.
        zeros: Write zeros into what is pruned of the weights, after the update.
        maximize: Follow gradients upwards.
        numbers: Of the layers, one each; with ``clock`` the counter of the random numbers that round a decay in 16
            bits. None for zeros.
        clock: Of the step.

    Raises:
        ValueError: If the lists or their entries do not fit, or there is no such rule; nothing is changed then.

    Example:
        >>> weight, gradient = torch.ones(4, 4), torch.ones(4, 4)
        >>> moments, codes = torch.zeros(2, 4, 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16)
        >>> lists = [[weight], [gradient], [moments[0]], [moments[1]], [codes], *[[]] * 5]
        >>> sparse_adamw_(*lists, lr=0.5, beta1=0.75, beta2=0.75, epsilon=0.0, weight_decay=0.0, step=1.0)
        >>> weight[0, 0].item()
        0.5
    """
    lists = weights, gradients, exp_avgs, exp_avg_sqs, codes
    own, _ = _check(*lists, values, meta, values_t, meta_t, tables, orders, rule, numbers)
    sums, factor = factors(lr, beta1, beta2, epsilon, weight_decay, step), _factor(rule, decay, lr)
    _update_by_reference(*lists, own, sums, rule, factor, zeros, maximize, clock)
    if values or values_t:
        pack_tiles_(weights, codes, values, meta, values_t, meta_t, tables, orders)


@sparse_adamw_.register_fake
def _(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: float,
    orders: Sequence[int] | None = None,
    rule: str = "none",
    decay: float = 0.0,
    zeros: bool = False,
    maximize: bool = False,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
) -> None:
    lists = weights, gradients, exp_avgs, exp_avg_sqs, codes
    _check(*lists, values, meta, values_t, meta_t, tables, orders, rule, numbers)


@sparse_adamw_.register_kernel("cuda")
def _(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: float,
    orders: Sequence[int] | None = None,
    rule: str = "none",
    decay: float = 0.0,
    zeros: bool = False,
    maximize: bool = False,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
) -> None:
    from .triton_kernel import update_in_place

    lists = weights, gradients, exp_avgs, exp_avg_sqs, codes
    own, sides = _check(*lists, values, meta, values_t, meta_t, tables, orders, rule, numbers)
    sums, factor = factors(lr, beta1, beta2, epsilon, weight_decay, step), _factor(rule, decay, lr)
    entries = zip(weights, exp_avgs, exp_avg_sqs, strict=True)
    if all(_suits_kernel(*entry) for entry in entries):
        by_rows = [gradient if gradient.stride(1) == 1 else gradient.contiguous() for gradient in gradients]
        update_in_place(
            weights, by_rows, exp_avgs, exp_avg_sqs, codes, *sides, own, sums, rule, factor, zeros, maximize, clock
        )
        return
    _update_by_reference(*lists, own, sums, rule, factor, zeros, maximize, clock)
    if values or values_t:
        pack_tiles_(weights, codes, values, meta, values_t, meta_t, tables, orders)


def _update_by_reference(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    codes: Sequence[Tensor],
    numbers: Sequence[int],
    sums: Factors,
    rule: str,
    decay: float,
    zeros: bool,
    maximize: bool,
    clock: int,
) -> None:
    options = {"rule": cast(Rule, rule), "decay": decay, "zeros": zeros, "maximize": maximize, "clock": clock}
    for position, entry in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs, codes, strict=True)):
        adamw_(*entry, sums, number=numbers[position], **options)  # type: ignore[arg-type]


def _factor(rule: str, decay: float, lr: float) -> float:
    return {"decay_weight": -decay * lr, "shrink_weight": -decay}.get(rule, decay)


def _suits_kernel(weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    by_rows = weight.stride(1) == exp_avg.stride(1) == 1
    return by_rows and exp_avg.stride() == exp_avg_sq.stride() and weight.numel() > 0


def _check(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    codes: Sequence[Tensor],
    values: Sequence[Tensor],
    meta: Sequence[Tensor],
    values_t: Sequence[Tensor],
    meta_t: Sequence[Tensor],
    tables: Sequence[Tensor],
    orders: Sequence[int] | None,
    rule: str,
    numbers: Sequence[int] | None,
) -> tuple[Sequence[int], tuple[Side | None, Side | None]]:
    """Return the numbers of the layers and the targets, or raise ``ValueError`` where something does not fit."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}: it must be one of {', '.join(map(repr, RULES))}.")
    columns = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "codes": codes}
    for name, column in {**columns, **({} if numbers is None else {"numbers": numbers})}.items():
        if len(column) != len(weights):
            raise ValueError(f"{name} has {len(column)} entries but weights has {len(weights)}: pass one for each.")
    for position, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[0] % 4 or weight.shape[1] % 4 or weight.dtype not in DTYPES:
            raise ValueError(
                f"weights[{position}] is {weight.dtype} {tuple(weight.shape)}: it must be a float32 or bfloat16 matrix "
                "whose sizes are multiples of 4, so leave it to torch.optim.AdamW."
            )
        tiles = (weight.shape[0] // 4, weight.shape[1] // 4)
        for name, column in columns.items():
            shape, dtype = (tiles, torch.int16) if name == "codes" else (tuple(weight.shape), weight.dtype)
            found = column[position]
            wrong = tuple(found.shape) != shape or found.dtype != dtype or found.device != weight.device
            if wrong or (name == "codes" and not found.is_contiguous()):
                raise ValueError(
                    f"{name}[{position}] is {found.dtype} {tuple(found.shape)} on {found.device}: with a weight "
                    f"{tuple(weight.shape)} it must be {'contiguous ' * (name == 'codes')}{dtype} {shape} on "
                    f"{weight.device}."
                )
    sides = sides_of(weights, codes, values, meta, values_t, meta_t, tables, orders)
    return [0] * len(weights) if numbers is None else numbers, sides
