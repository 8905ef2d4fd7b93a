"""``CarriedState``: state of sparse training in the optimizer's state dict, for trainers that save no other."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..checks.rules import DICT, optional, sequence
from ..checks.states import refuse
from .pruned_entries import CHECKPOINT_KEY

APART = "apart"


class CarriedState:
    """Puts state into the first group of ``optimizer.state_dict()``, whose loading brings it back wherever it is from.

    Optimizers keep what they do not know in the groups that they load, so :func:`take_carried` finds it there.

    Args:
        optimizer: A plain one.
        state: Makes what is put under the key ``"sparsetrain"``; plain numbers, strings and tensors.
        apart: Parameters that the optimizer which is to load the state dict does not own yet: they are left out of it,
            and what the optimizer knows of them is carried.

    Example:
        >>> import torch
        >>> optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]) for _ in range(2)]
        >>> carried = CarriedState(optimizers[0], lambda: {"clock": 3})
        >>> optimizers[1].load_state_dict(optimizers[0].state_dict())
        >>> take_carried(optimizers[1])["clock"], take_carried(optimizers[1])
        (3, None)
        >>> carried.remove()
    """

    def __init__(
        self, optimizer: Optimizer, state: Callable[[], Mapping[str, Any]], apart: Sequence[Tensor] = ()
    ) -> None:
        self._state = state
        self._apart = {id(parameter) for parameter in apart}
        self._handle = optimizer.register_state_dict_post_hook(self._carry)

    def remove(self) -> None:
        """Have the optimizer save its own state alone."""
        self._handle.remove()

    def _carry(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        groups, states, apart, count = [], {}, [], 0
        for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            numbers = []
            for parameter, number in zip(group["params"], packed["params"], strict=True):
                state = saved["state"].get(number)
                if id(parameter) in self._apart:
                    apart.append(state)
                    continue
                if state is not None:
                    states[count] = state
                numbers.append(count)
                count += 1
            groups.append({**packed, "params": numbers})
        groups[0][CHECKPOINT_KEY] = {**self._state(), APART: apart}
        return {**saved, "state": states, "param_groups": groups}


def take_carried(optimizer: Optimizer) -> dict[str, Any] | None:
    """Take carried state out of the optimizer that has loaded it; None if there is none.

    Example:
        >>> import torch
        >>> take_carried(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])) is None
        True
    """
    found: dict[str, Any] | None = optimizer.param_groups[0].pop(CHECKPOINT_KEY, None)
    return found


def load_apart(optimizer: Optimizer, carried: Mapping[str, Any], apart: Sequence[Tensor]) -> None:
    """Give an optimizer what was carried of parameters apart, which it owns by now.

    Args:
        optimizer: Has loaded the state of all other parameters.
        carried: What :func:`take_carried` returned.
        apart: As for :class:`CarriedState`, in any order.

    Raises:
        ValueError: If what was carried is damaged or of other parameters; nothing is changed then.

    Example:
        >>> import torch
        >>> first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> optimizer = torch.optim.SGD([first, second])
        >>> load_apart(optimizer, {"apart": [{"momentum_buffer": torch.ones(1)}]}, [second])
        >>> optimizer.state[second]["momentum_buffer"].item()
        1.0
    """
    states = sequence(optional(DICT), length=len(apart))
    if complaint := states.complaint(f"state[{APART!r}]", carried.get(APART)):
        refuse(complaint)
    saved, own = optimizer.state_dict(), {id(parameter) for parameter in apart}
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    numbers = [number for number, parameter in enumerate(parameters) if id(parameter) in own]
    known = {number: state for number, state in zip(numbers, carried[APART], strict=True) if state}
    if known:
        optimizer.load_state_dict({**saved, "state": {**saved["state"], **known}})
