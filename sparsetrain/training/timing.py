"""``StepTimer``: where a benchmark hangs on the parts of a run's steps."""

from contextlib import AbstractContextManager
from typing import Literal, Protocol

Part = Literal["refresh", "repack"]
"""The mask search; packing weights for sparse products."""


class StepTimer(Protocol):
    """What :attr:`sparsetrain.SparseTraining.timer` can be: it times the host, or records events of a device.

    Example:
        >>> import contextlib, torch
        >>> from sparsetrain import SparseTraining
        >>> class Names:
        ...     def __init__(self):
        ...         self.parts = []
        ...     def part(self, name):
        ...         self.parts.append(name)
        ...         return contextlib.nullcontext()
        >>> model = torch.nn.Linear(8, 8)
        >>> training = SparseTraining(model, torch.optim.SGD(model.parameters()), "sr_ste", verbose=False)
        >>> training.timer = Names()
        >>> training.refresh()
        >>> training.timer.parts
        ['refresh', 'repack']
    """

    def part(self, name: Part) -> AbstractContextManager[object]:
        """Return what a part of a step runs inside."""
