"""Which run trains which layers, so that a second one is told, or takes over what an interrupted one has left."""

from collections.abc import Iterable
from typing import Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import nn

from .conversion import to_dense_
from .masked_layer import MaskedLayer


class Run(Protocol):
    """What is asked of a :class:`sparsetrain.SparseTraining`."""

    @property
    def clock(self) -> int:
        """Optimizer steps taken."""

    @property
    def finished(self) -> bool:
        """Whether it has given its layers back."""

    def finish(self, *, zeros: bool = True) -> None:
        """Give them back."""


_RUNS: WeakKeyDictionary[nn.Module, ReferenceType[Run]] = WeakKeyDictionary()


def claim(layers: Iterable[MaskedLayer], run: Run) -> None:
    """Note that a run trains these layers."""
    for layer in layers:
        layer.scheduled = True
        _RUNS[layer] = ref(run)


def run_of(layer: nn.Module) -> Run | None:
    """Return the run that trains a layer now, or None."""
    reference = _RUNS.get(layer)
    run = reference() if reference is not None else None
    return None if run is None or run.finished else run


def take_over(model: nn.Module) -> list[int]:
    """Finish the runs that still train layers of a model, whoever made them; their layers keep the dense masters.

    Layers that :func:`sparsetrain.sparsify_` made without a run stay sparse.

    Returns:
        Of every run that was there, the step it had come to.

    Example:
        >>> import torch
        >>> from sparsetrain import SparseTraining
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> training = SparseTraining(model, torch.optim.SGD(model.parameters()), "sr_ste", verbose=False)
        >>> take_over(model), type(model[0]).__name__, training.finished
        ([0], 'Linear', True)
    """
    clocks = []
    for layer in [module for module in model.modules() if isinstance(module, MaskedLayer)]:
        run = run_of(layer)
        if run is not None:
            run.finish(zeros=False)
            clocks.append(run.clock)
        elif isinstance(layer, MaskedLayer) and layer.scheduled:  # its run is gone, or it is a copy of a layer
            to_dense_(layer, zeros=False)
    return clocks
