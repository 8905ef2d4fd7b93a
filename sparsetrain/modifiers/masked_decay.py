"""Masked decay pulls pruned weights to zero, so that masks settle: on gradients or weights, constant or automatic."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..distributed.wrappers import state_holder
from ..kernels.adamw import Rule
from ..layers.layer_group import LayerGroup
from ..types import DecayTarget

AUTO_START = 1e-4
"""λ that ``decay="auto"`` begins with."""

BAND = (0.60, 0.95)
"""Flip rates of sparse training over those of dense training that are healthy."""

FACTOR = 1.5
"""By which λ changes at a refresh outside the band."""


class MaskedDecay:
    """λ of a run, and its use before every optimizer step.

    Args:
        decay: λ, or ``"auto"``: λ follows the ratio of flip rates and keeps it in the band.
        target: What the decay is added to.
        ramp: Optimizer steps in which λ grows from 0 to its value.

    Example:
        >>> decay = MaskedDecay("auto")
        >>> decay.adapt(1.2)  # masks flip as if there was no decay
        >>> round(decay.at(0) / AUTO_START, 3)
        1.5

    Source: on gradients and the band: Hu et al. 2024, arXiv 2404.01847; on weights: Zhou et al. 2021, arXiv 2102.04010;
    the ramp: Huang et al. 2025, "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI.
    """

    def __init__(self, decay: float | Literal["auto"] = 0.0, target: DecayTarget = "gradient", ramp: int = 0) -> None:
        self.automatic = decay == "auto"
        self.value = AUTO_START if decay == "auto" else float(decay)
        self._target, self.ramp = target, ramp

    def at(self, age: int) -> float:
        """Return λ in the sparse phase's step number ``age``, from 0 up."""
        return self.value * min(1.0, (age + 1) / self.ramp) if self.ramp else self.value

    def is_on_gradients(self, optimizer: Optimizer) -> bool:
        """Say whether the decay is added to gradients, not to weights."""
        return self._target == "gradient" or (
            self._target == "by_optimizer" and not isinstance(state_holder(optimizer), SGD)
        )

    def adapt(self, ratio: float | None) -> None:
        """Change an automatic λ after a refresh, given the flip rate over that of dense training."""
        if self.automatic and ratio is not None:
            self.value *= FACTOR if ratio > BAND[1] else 1 / FACTOR if ratio < BAND[0] else 1.0

    def rule_of(self, optimizer: Optimizer) -> Rule:
        """Return what an optimizer that decays weights itself has to do."""
        if self._target == "share":
            return "shrink_weight"
        return "decay_gradient" if self.is_on_gradients(optimizer) else "decay_weight"

    def apply_(
        self,
        optimizer: Optimizer,
        group: LayerGroup,
        gradients: Sequence[Tensor],
        age: int,
        clock: int,
        scale: Tensor | None,
    ) -> None:
        """Add the decay of one step; to 16-bit gradients or weights in float32, rounded at random to the right mean.

        Args:
            optimizer: Whose step it is.
            group: Layers whose gradients are final but for ``scale``.
            gradients: Theirs.
            age: Steps since the sparse phase began.
            clock: Steps since the run began; with the name, it makes the random numbers.
            scale: By which gradients are multiplied, if they are.
        """
        if not self.value:
            return
        device = group.weights[0].device
        # a number is written on the device, never read from it
        decay = torch.full((), self.at(age), dtype=torch.float64, device=device)
        if self.is_on_gradients(optimizer):
            decay = decay if scale is None else decay * scale.to(device)
            group.decay_(gradients, decay, clock)
            return
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            decay = decay * (found_inf.to(device) == 0)  # a step that will be skipped
        if self._target == "share":
            group.decay_(group.weights, -decay, clock)
            return
        rates = {id(parameter): entry["lr"] for entry in optimizer.param_groups for parameter in entry["params"]}
        for own in group.split([id(rates[id(weight)]) for weight in group.parameters]):
            own.decay_(own.weights, -decay * rates[id(own.parameters[0])], clock)
