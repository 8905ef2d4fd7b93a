"""``CarriedState``: state of sparse training in the optimizer's state dict, for trainers that save no other."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from .pruned_entries import CHECKPOINT_KEY


class CarriedState:
    """Puts state into the first group of ``optimizer.state_dict()``, whose loading brings it back wherever it is from.

    Optimizers keep what they do not know in the groups that they load, so :func:`take_carried` finds it there.

    Args:
        optimizer: A plain one.
        state: Makes what is put under the key ``"sparsetrain"``; plain numbers, strings and tensors.

    Example:
        >>> import torch
        >>> optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]) for _ in range(2)]
        >>> carried = CarriedState(optimizers[0], lambda: {"clock": 3})
        >>> optimizers[1].load_state_dict(optimizers[0].state_dict())
        >>> take_carried(optimizers[1])["clock"], take_carried(optimizers[1])
        (3, None)
        >>> carried.remove()
    """

    def __init__(self, optimizer: Optimizer, state: Callable[[], Mapping[str, Any]]) -> None:
        self._state = state
        self._handle = optimizer.register_state_dict_post_hook(self._carry)

    def remove(self) -> None:
        """Have the optimizer save its own state alone."""
        self._handle.remove()

    def _carry(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        first, *others = saved["param_groups"]
        return {**saved, "param_groups": [{**first, CHECKPOINT_KEY: {**self._state()}}, *others]}


def take_carried(optimizer: Optimizer) -> dict[str, Any] | None:
    """Take carried state out of the optimizer that has loaded it; None if there is none.

    Example:
        >>> import torch
        >>> take_carried(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])) is None
        True
    """
    found: dict[str, Any] | None = optimizer.param_groups[0].pop(CHECKPOINT_KEY, None)
    return found
