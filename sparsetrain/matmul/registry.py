"""The operands of layers, found by their codes, and told of the optimizers' steps that write to their weights."""

import functools
import weakref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..kernels.torch_internals import storage_address
from .operands import Layer, Operands

_OPERANDS: weakref.WeakValueDictionary[int, Operands] = weakref.WeakValueDictionary()
"""By the storage of the codes, which a layer owns alone, wherever its weight comes from."""

_UNMANAGED: weakref.WeakSet[Operands] = weakref.WeakSet()
"""Those of layers, which every optimizer's step has to be asked about; who manages some is found out there."""


def register(layer: Layer) -> None:
    """Let products find a layer's operands; again after its codes have moved."""
    _watch_optimizers()
    operands = layer.operands
    operands.owner = weakref.ref(layer)
    _OPERANDS[storage_address(layer.mask_codes)] = operands
    if not operands.managed:
        _UNMANAGED.add(operands)


def operands_of(codes: Tensor) -> Operands | None:
    """Return the operands of the layer that has these codes."""
    found = _OPERANDS.get(storage_address(codes))
    owner = None if found is None or found.owner is None else found.owner()
    # the address of codes that are gone may be that of others now
    return found if owner is not None and storage_address(owner.mask_codes) == storage_address(codes) else None


@functools.cache
def _watch_optimizers() -> None:
    def invalidate(optimizer: Optimizer, arguments: object, keywords: object) -> None:
        if not _UNMANAGED:
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for operands in list(_UNMANAGED):
            owner = None if operands.owner is None else operands.owner()
            if operands.managed:
                _UNMANAGED.discard(operands)
            elif owner is not None and (id(owner.weight) in owned or id(owner.bias) in owned):
                operands.invalidate()

    register_optimizer_step_post_hook(invalidate)
