"""A higher learning rate for layers with masks: their updates are lengthened behind the optimizer, whichever it is."""

from typing import Self

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..kernels.torch_internals import foreach_lerp_
from ..layers.masked_step import TakesMaskedSteps
from ..methods.method import Method
from .base import Modifier, Run, Setup, Step, Updated


class ScaledUpdates(Modifier):
    """Multiplies what a step changes in weights whose masks are in force.

    Half as many weights in a sum move it half as far, so they have to move twice as far for the same change. A copy of
    the weights is held while an optimizer steps, but for those that a :class:`TakesMaskedSteps` updates by itself.

    Args:
        method: Of the run.

    Example:
        >>> from sparsetrain.methods import Method
        >>> ScaledUpdates(Method(lr_factor=2.0)).metrics()
        {}

    Source: Dey, Bergsma, Hestness, "Sparse maximal update parameterization", NeurIPS 2024, arXiv 2405.15743, table 1:
    learning rates of Adam in proportion to 1 / density.
    """

    name = "scaled_updates"

    def __init__(self, method: Method) -> None:
        self._factor = method.lr_factor
        self._before: list[tuple[list[Tensor], list[Tensor]]] = []  # weights, and copies of them

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` if an optimizer moves weights several times in a step."""
        factor = setup.method.lr_factor
        if factor != 1 and any(isinstance(optimizer, LBFGS) for optimizer in setup.optimizers):
            raise ValueError(
                f"optimizer is LBFGS but method has lr_factor={factor}, and its step asks for the loss between moves: "
                "set lr_factor=1, or use another optimizer."
            )

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for methods with an ``lr_factor``."""
        return cls(run.method) if run.method.lr_factor != 1 else None

    def before_step(self, run: Run, step: Step) -> None:
        """Remember the weights, or tell an optimizer that updates them itself."""
        self._before = []
        names = run.active & step.gradients.keys()
        told = step.optimizer.masked_step if isinstance(step.optimizer, TakesMaskedSteps) else None
        if told is not None:
            told.lr_factor = self._factor
            names -= told.layers.keys()
        for group in run.groups.of(run.groups.chosen(run.layers, names)) if names else ():
            weights = [weight.detach() for weight in group.weights]
            self._before.append((weights, [weight.clone() for weight in weights]))

    @torch.no_grad()
    def after_update(self, optimizer: Optimizer) -> Updated:
        """Lengthen what the step has changed."""
        for weights, before in self._before:
            foreach_lerp_(weights, before, 1 - self._factor)
        self._before = []
        return Updated()
