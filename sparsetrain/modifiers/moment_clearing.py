"""``MomentClearing``: forgets the optimizer's moments of entries that freezing masks prune."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed.shards import local
from ..distributed.wrappers import state_holder
from ..kernels.masked_update import apply_mask_
from ..layers.masked_layer import MaskedLayer, written_as_matrices
from .base import Entry, Modifier, Run, Setup


class MomentClearing(Modifier):
    """Writes zeros into the pruned entries of optimizer states, as their masks freeze.

    Args:
        optimizers: Whose states.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> layer = SparseLinear(8, 4)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer.state[layer.weight]["momentum_buffer"] = torch.ones(4, 8)
        >>> layer.set_codes_(torch.full((1, 2), 0x5A5A, dtype=torch.int16))
        >>> MomentClearing([optimizer]).clear_(layer)
        >>> optimizer.state[layer.weight]["momentum_buffer"].sum().item()
        16.0
    """

    name = "moment_clearing"

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods with ``clear_moments``."""
        return cls(run.optimizers) if run.method.clear_moments else None

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Clear the moments of layers whose mask freezes now."""
        if run.phase == "frozen":
            for name in entry.fresh:
                self.clear_(run.layers[name])

    @torch.no_grad()
    def clear_(self, layer: MaskedLayer) -> None:
        """Write zeros into the pruned entries of every optimizer state that has the weight's shape."""
        parameter = layer.weight
        for optimizer in self._optimizers:
            for value in state_holder(optimizer).state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    with written_as_matrices([layer], [local(value)]) as (matrix,):
                        apply_mask_(matrix, layer.mask_codes)
