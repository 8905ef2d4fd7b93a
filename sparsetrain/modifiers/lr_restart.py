"""Restart of the learning-rate schedule for a retrain phase."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checks.rules import NOT_NEGATIVE, each, mapping, optional, sequence
from ..checks.states import like, refuse_missing, require_part
from .base import Modifier, Resumed, Run, Setup, Step


class LRRestart(Modifier):
    """Remembers learning rates and scheduler states as they are now, and brings them back.

    Args:
        optimizers: The optimizers whose groups hold the learning rates.
        schedulers: Their schedulers, at their first step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        >>> restart = LRRestart([optimizer], [scheduler])
        >>> optimizer.step(); scheduler.step(); restart.restart()
        >>> optimizer.param_groups[0]["lr"], scheduler.last_epoch
        (1.0, 0)
    """

    name = "lr_restart"

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]) -> None:
        self._optimizers = list(optimizers)
        self._schedulers = list(schedulers)
        self._rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in self._optimizers]
        self._states = [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` if there is no schedule to restart."""
        if setup.method.restart_lr and not setup.lr_schedulers:
            raise ValueError(
                "method has restart_lr=True but lr_schedulers is empty: pass the learning-rate schedulers."
            )

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods with ``restart_lr``."""
        return cls(setup.optimizers, setup.lr_schedulers) if run.method.restart_lr else None

    def before_step(self, run: Run, step: Step) -> None:
        """Restart in the first step of a frozen phase."""
        if run.phase == "frozen" and not run.age:
            self.restart()

    def restart(self) -> None:
        """Bring back the learning rates and scheduler states of the first step."""
        for scheduler, state in zip(self._schedulers, self._states, strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if hasattr(group["lr"], "fill_"):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return what is remembered."""
        return {"rates": copy.deepcopy(self._rates), "states": copy.deepcopy(self._states)}

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged or of other optimizers and schedulers; changes nothing."""
        if state is None and resumed.same:
            refuse_missing(self.name)
        rates = [sequence(NOT_NEGATIVE, length=len(rates)) for rates in self._rates]
        rule = mapping({"rates": each(rates), "states": like(self._states)})
        require_part(self.name, state, optional(rule))

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take back what :meth:`state_dict` returned; None leaves what is remembered."""
        if state is None:
            return
        self._rates, self._states = copy.deepcopy(state["rates"]), copy.deepcopy(state["states"])
