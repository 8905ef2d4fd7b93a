"""Frozen second moments: Adam goes on with its first moments, scaled as gradients were when the others froze."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from .checks import number, optional, sequence
from .state_schema import require_state

INIT_GROUP = "_init_group"
"""Where Adam collects what it updates in a group; a frozen update takes place there, so that hooks see one step."""

UNABLE = ("amsgrad", "fused", "differentiable")
"""Options of Adam that a frozen update has not."""


class FrozenMoments:
    """Updates every parameter with its running first and its frozen second moment; Adam keeps its state as it is.

    ``m_t = β₁·m_{t-1} + (1 - β₁)·g_t`` and ``w -= lr·m_t / (1 - β₁ᵗ) / (√v* + ε)``, where
    ``v* = v_T / (1 - β₂ᵀ)`` is the moment after the parameter's T steps until then. Weight decay is the optimizer's.
    A parameter that had no step until then has nothing to freeze, so Adam goes on for it.

    Args:
        optimizers: Those whose parameters are meant, all of them; none to freeze nothing.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.0, 0.9), eps=0.0)
        >>> moments = FrozenMoments([optimizer])
        >>> for gradient in (1.0, 4.0):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        ...     moments.freeze()
        >>> weight.item()  # -1 / √1 - 4 / √1
        -5.0

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", ICML 2023,
    arXiv 2302.01172.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._corrections: dict[int, float] | None = None  # parameter's id to 1 - β₂ᵀ

    def freeze(self) -> None:
        """Freeze the second moments that there are; does nothing if some are frozen already."""
        if self._corrections is not None or not self._optimizers:
            return
        found: dict[int, float] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    count = float(optimizer.state.get(parameter, {}).get("step", 0.0))
                    if count:
                        found[id(parameter)] = 1 - float(group["betas"][1]) ** count
        self._replace_updates(found)

    def remove(self) -> None:
        """Have Adam update everything again."""
        self._corrections = None
        for optimizer in self._optimizers:
            optimizer.__dict__.pop(INIT_GROUP, None)

    def state_dict(self) -> list[list[float]] | None:
        """Return ``1 - β₂ᵀ`` of every optimizer's parameters in their order, 0 if not frozen; None before."""
        if self._corrections is None:
            return None
        return [
            [self._corrections.get(id(parameter), 0.0) for parameter in _parameters(optimizer)]
            for optimizer in self._optimizers
        ]

    def check_state_dict(self, state: Any) -> None:
        """Raise ``ValueError`` if a state is damaged or of other optimizers; changes nothing."""
        share = number("a number from 0 to 1", lambda value: 0 <= value <= 1)
        require_state("frozen_moments", state, optional(sequence(sequence(share))))
        here = [len(_parameters(optimizer)) for optimizer in self._optimizers]
        if state is not None and here and [len(entries) for entries in state] != here:
            raise ValueError(
                f"state has frozen moments of {[len(entries) for entries in state]} parameters but the optimizers have "
                f"{here}: resume with the same optimizers."
            )

    def load_state_dict(self, state: Sequence[Sequence[float]] | None) -> None:
        """Take back what :meth:`state_dict` returned; the moments themselves are in the optimizers' states."""
        self.check_state_dict(state)
        self.remove()
        if state is None or not self._optimizers:
            return
        found: dict[int, float] = {}
        for optimizer, entries in zip(self._optimizers, state, strict=True):
            found.update(zip(map(id, _parameters(optimizer)), map(float, entries), strict=True))
        self._replace_updates({key: value for key, value in found.items() if value})

    def _replace_updates(self, corrections: dict[int, float]) -> None:
        self._corrections = corrections
        for optimizer in self._optimizers:
            optimizer.__dict__[INIT_GROUP] = functools.partial(self._init_group, optimizer)

    def _init_group(self, optimizer: Optimizer, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Update what is frozen, and give Adam the rest of the group."""
        assert self._corrections is not None
        frozen: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        others = []
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                self._corrections.pop(id(parameter), None)  # its moments were dropped
            if parameter.grad is None or id(parameter) not in self._corrections:
                others.append(parameter)
            else:
                frozen.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        for parameters in frozen.values():
            states = [optimizer.state[parameter] for parameter in parameters]
            corrections = [self._corrections[id(parameter)] for parameter in parameters]
            update_(parameters, states, corrections, {"decoupled_weight_decay": type(optimizer) is AdamW, **group})
        return bool(getattr(type(optimizer), INIT_GROUP)(optimizer, {**group, "params": others}, *lists))


@torch.no_grad()
def update_(
    parameters: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], corrections: Sequence[float],
    group: Mapping[str, Any],
) -> None:  # fmt: skip
    """Update parameters, their first moments and their counts.

    Args:
        parameters: With gradients, on one device and in one dtype.
        states: Adam's: ``exp_avg`` and ``step`` are updated, ``exp_avg_sq`` is read.
        corrections: ``1 - β₂ᵀ`` of each.
        group: Adam's options.

    Example:
        >>> weight, state = torch.ones(1), {name: torch.zeros(1) for name in ("step", "exp_avg", "exp_avg_sq")}
        >>> weight.grad = torch.ones(1)
        >>> options = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1.0, "weight_decay": 0.0, "maximize": False}
        >>> update_([weight], [state], [0.001], {**options, "capturable": False, "decoupled_weight_decay": False})
        >>> weight.item(), state["step"].item()
        (0.5, 1.0)
    """
    weights = _real(parameters)
    gradients = _real([parameter.grad for parameter in parameters if parameter.grad is not None])
    averages, squares = (_real([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
    counts, beta = [state["step"] for state in states], float(group["betas"][0])
    rate, decay = group["lr"], group["weight_decay"]
    if not group["capturable"]:
        rate = float(rate)
    elif isinstance(rate, Tensor):
        rate = rate.to(weights[0].device).squeeze()
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    torch._foreach_add_(counts, 1)
    if decay and group["decoupled_weight_decay"]:
        torch._foreach_mul_(weights, 1 - rate * decay)
    elif decay:
        gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
    torch._foreach_lerp_(averages, gradients, 1 - beta)
    divisors = torch._foreach_sqrt(squares)
    torch._foreach_div_(divisors, [correction**0.5 for correction in corrections])
    torch._foreach_add_(divisors, group["eps"])
    if not group["capturable"]:
        torch._foreach_addcdiv_(weights, averages, divisors, [-rate / (1 - beta ** float(count)) for count in counts])
        return
    # a capturable step reads nothing from the device
    scales = torch._foreach_pow(beta, counts)
    torch._foreach_sub_(scales, 1)
    torch._foreach_div_(scales, rate)
    torch._foreach_mul_(divisors, scales)
    torch._foreach_addcdiv_(weights, averages, divisors)


def require_freezable(optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` unless second moments of every optimizer can be frozen.

    Example:
        >>> require_freezable([torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])])
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if type(optimizer) not in (Adam, AdamW) or not hasattr(optimizer, INIT_GROUP):
            raise ValueError(
                f"optimizer is {name} but freeze_second_moments needs torch.optim.Adam or AdamW itself: use one of "
                "them, or set freeze_second_moments=False."
            )
        for option in UNABLE:
            if any(group.get(option) for group in optimizer.param_groups):
                raise ValueError(
                    f"optimizer is {name} with {option}=True but freeze_second_moments needs {option}=False: turn one "
                    "of them off."
                )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
