"""``StepTimer``: who wants to know how long the parts of a step take."""

from contextlib import AbstractContextManager
from typing import Literal, Protocol


class StepTimer(Protocol):
    """What :class:`sparsetrain.SparseTraining` runs parts of a step in, once it is its ``timer``.

    Example:
        >>> from contextlib import nullcontext
        >>> class Names:
        ...     def part(self, name):
        ...         print(name)
        ...         return nullcontext()
        >>> import torch
        >>> from sparsetrain import SparseTraining
        >>> model = torch.nn.Linear(8, 8)
        >>> training = SparseTraining(model, torch.optim.SGD(model.parameters()), "sr_ste", verbose=False)
        >>> training.timer = Names()
        >>> training.refresh()
        refresh
        repack
    """

    def part(self, name: Literal["refresh", "repack"]) -> AbstractContextManager[object]:
        """Return what a mask search, or the packing after a step, runs in."""
