"""A higher learning rate for layers with masks: their updates are lengthened after the optimizer's."""

import warnings
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..distributed.shards import local
from ..distributed.wrappers import state_holder
from ..kernels.torch_internals import foreach_lerp_
from ..layers.layer_group import LayerGroup
from ..layers.masked_layer import MaskedLayer
from ..layers.masked_step import TakesMaskedSteps
from ..methods.method import Method
from .base import Modifier, Run, Setup, Step, Updated

NEAR = 0.5
"""A tensor is a copy of weights if it is nearer to them than this share of their norm."""

MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""Tensors that are none, though a weight decay in gradients may bring them near."""


class ScaledUpdates(Modifier):
    """Multiplies what a step changes in weights whose masks are in force.

    Half as many weights in a sum move it half as far, so they have to move twice as far for the same change. A copy of
    the weights is held while an optimizer steps, but for those that a :class:`TakesMaskedSteps` updates by itself.

    An optimizer that holds weights in its own state (float32 masters, averages, what SAM or Lookahead go back to) would
    not see the longer change: it is left alone, with a warning.

    Args:
        method: Of the run.

    Example:
        >>> from sparsetrain.methods import Method
        >>> ScaledUpdates(Method(lr_factor=2.0)).name
        'scaled_updates'

    Source: Dey, Bergsma, Hestness, "Sparse maximal update parameterization", NeurIPS 2024, arXiv 2405.15743, table 1:
    learning rates of Adam in proportion to 1 / density.
    """

    name = "scaled_updates"

    def __init__(self, method: Method) -> None:
        self._factor = method.lr_factor
        self._before: dict[Optimizer, list[tuple[LayerGroup, list[Tensor]]]] = {}  # layers, and copies of their weights
        self._entries: dict[Optimizer, int] = {}  # of the state that was looked at
        self._left_alone: set[Optimizer] = set()

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
        """Remember the weights, but for those that an optimizer updates itself."""
        self.drop_step(step.optimizer)  # one that failed
        names = run.active & step.gradients.keys()
        told = step.optimizer.masked_step if isinstance(step.optimizer, TakesMaskedSteps) else None
        if told is not None:
            names -= {name for name, layer in told.layers.items() if run.layers.get(name) is layer}
        layers = run.groups.chosen(run.layers, names) if names else {}
        if layers and not self._is_left_alone(step.optimizer, layers):
            groups = run.groups.of(layers)
            self._before[step.optimizer] = [
                (group, [weight.detach().clone() for weight in group.weights]) for group in groups
            ]

    @torch.no_grad()
    def after_update(self, optimizer: Optimizer) -> Updated:
        """Lengthen what the step has changed."""
        for group, before in self._before.pop(optimizer, ()):
            foreach_lerp_([weight.detach() for weight in group.weights], before, 1 - self._factor)
        return Updated()

    def drop_step(self, optimizer: Optimizer) -> None:
        """Forget the weights before it."""
        self._before.pop(optimizer, None)

    def detach(self) -> None:
        """Forget the weights before a step that failed."""
        self._before.clear()

    def _is_left_alone(self, optimizer: Optimizer, layers: Mapping[str, MaskedLayer]) -> bool:
        """Say whether an optimizer holds weights itself, and warn when that is found; a look at one layer is enough."""
        if optimizer in self._left_alone:
            return True
        name, layer = next(iter(layers.items()))
        state = state_holder(optimizer).state.get(layer.parameter, {})
        if len(state) == self._entries.get(optimizer):
            return False
        self._entries[optimizer] = len(state)
        tensors = {key: value for key, value in state.items() if key not in MOMENTS}
        copy = next((key for key, value in tensors.items() if _is_copy(value, layer.parameter)), None)
        if copy is None:
            return False
        self._left_alone.add(optimizer)
        warnings.warn(
            f"optimizer {type(optimizer).__name__} holds weights itself ({copy!r} of layer {name!r}), which lr_factor="
            f"{self._factor:g} does not reach, so sparse layers learn at its own rate: set lr_factor=1 and give them a "
            f"parameter group with {self._factor:g} times the rate.",
            stacklevel=2,
        )
        return True


@torch.no_grad()
def _is_copy(value: object, weight: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != weight.shape or not value.is_floating_point():
        return False
    ours = local(weight).float()
    theirs = local(value).to(ours)  # it may be offloaded
    return bool((theirs - ours).norm() < NEAR * ours.norm())
