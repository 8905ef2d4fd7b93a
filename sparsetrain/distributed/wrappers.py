"""What trainers wrap around models and optimizers, taken off: Accelerate's, Fabric's, Lightning's and torch's own."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..kernels.torch_internals import COMPILED_MODULE

INNER_NAMES = (COMPILED_MODULE, "_original_module")
"""Where ``torch.compile`` (and Accelerate, which compiles blocks alone) and Fabric keep the module they wrap."""


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
