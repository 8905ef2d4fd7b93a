"""What trainers wrap around models and optimizers, taken off: Accelerate's, Fabric's, Lightning's and torch's own."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..kernels.torch_internals import COMPILED_MODULE

INNER_NAMES = (COMPILED_MODULE, "_original_module")
"""Where ``torch.compile`` (and Accelerate, which compiles blocks alone) and Fabric keep the module they wrap."""


FSDP1_REASON = "FSDP1 (FullyShardedDataParallel) cuts weights anywhere, through 4×4 tiles"


def require_whole_weights(model: nn.Module) -> None:
    """Raise ``ValueError`` if a wrapper has taken the weights of a model apart, so that masks cannot follow.

    Example:
        >>> require_whole_weights(nn.Linear(4, 4))
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(f"model is wrapped in FSDP1: {FSDP1_REASON}, so use fully_shard (FSDP2) or DDP.")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model is sharded by DeepSpeed's ZeRO-3, which cuts flat parameters anywhere, through 4×4 tiles: use "
            "fully_shard (FSDP2)."
        )


def require_torch_training(model: nn.Module, optimizers: Iterable[Any]) -> None:
    """Raise ``ValueError`` if DeepSpeed trains a model, or ZeRO steps where no hook sees it.

    Example:
        >>> require_torch_training(nn.Linear(4, 4), [])
    """
    found = [type(module) for module in model.modules()]
    for optimizer in optimizers:
        while optimizer is not None:
            found.append(type(optimizer))
            if is_zero(optimizer) and not isinstance(getattr(optimizer, "optim", None), Optimizer):
                raise ValueError(
                    "optimizer is a ZeroRedundancyOptimizer with overlap_with_ddp=True, whose step is taken in the "
                    "backward, before masks can act: set it to False."
                )
            optimizer = getattr(optimizer, "optimizer", None)
    for kind in found:
        if any(base.__module__.partition(".")[0] == "deepspeed" for base in kind.__mro__):
            raise ValueError(
                f"{kind.__name__} is of DeepSpeed, whose optimizer steps flat partitions that are none of the model's "
                "weights: use DistributedDataParallel with ZeroRedundancyOptimizer, or fully_shard (FSDP2)."
            )


def state_holder(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds the states of this process: ZeRO's has one inside for its share of parameters.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        >>> state_holder(optimizer) is optimizer
        True
    """
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) and is_zero(optimizer) else optimizer


def is_zero(optimizer: Optimizer) -> bool:
    """Say whether an optimizer is torch's ``ZeroRedundancyOptimizer``, which steps a share of its parameters.

    Example:
        >>> import torch
        >>> is_zero(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        False
    """
    # not by its class, whose import takes a part of a second
    return any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__)


def plain_model(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel, compiled and Fabric wrappers; a plain model is returned itself.

    Example:
        >>> import torch
        >>> model = nn.Linear(4, 4)
        >>> plain_model(torch.compile(model)) is plain_model(model) is model
        True
    """
    while (inner := _inner_model(model)) is not None:
        model = inner
    return model


def _inner_model(model: nn.Module) -> nn.Module | None:
    if isinstance(model, DistributedDataParallel):
        return model.module  # type: ignore[no-any-return]
    for name in INNER_NAMES:
        # not getattr: wrappers such as peft's pass unknown names on to what they wrap
        inner = vars(model).get(name, model._modules.get(name))
        if isinstance(inner, nn.Module):
            return inner
    return None


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer whose ``step`` calls hooks, inside wrappers that pass ``step`` on to it.

    Those of Accelerate, Fabric and Lightning decide whether a call of ``step`` reaches their ``optimizer``: not while
    gradients accumulate or overflow. An optimizer of its own that has another inside, such as Lookahead, is none.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        >>> plain_optimizer(optimizer) is optimizer
        True
    """
    # torch marks the step of every class whose instances it has set up, which is the one that calls hooks
    while not getattr(type(optimizer).step, "hooked", False):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    return optimizer
