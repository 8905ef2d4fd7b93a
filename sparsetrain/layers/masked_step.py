"""``MaskedStep``: what masks do in an optimizer's step, told to an optimizer that can do it itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..kernels.adamw import Rule
from .masked_layer import MaskedLayer


@dataclass
class MaskedStep:
    """What one step does to weights with masks beside AdamW's update.

    Args:
        layers: Name to layer whose weight is meant; each has a gradient.
        rule: What masks do before the update.
        decay: λ of the rule.
        clock: Steps since the run began; with the name, it makes the random numbers that round in 16 bits.
        zeros: Write zeros into what is pruned, after the update.
        pack: Pack the updated weights into the layers' operands, as masks stay as they are.
        lr_factor: By which the learning rate of the weights is multiplied, but not that of the rule.
        packed: Names of the layers whose operands the step has renewed.
    """

    layers: Mapping[str, MaskedLayer]
    rule: Rule = "none"
    decay: float = 0.0
    clock: int = 0
    zeros: bool = False
    pack: bool = False
    lr_factor: float = 1.0
    packed: set[str] = field(default_factory=set)


class TakesMaskedSteps:
    """An optimizer that decays, masks and packs the weights of layers that it takes; to be inherited beside torch's."""

    masked_step: MaskedStep | None = None
    """What its next step is to do beside its update; it fills in ``packed``, and whoever set it takes it back."""

    def takes(self, layer: MaskedLayer) -> bool:
        """Say whether a step can do it to this layer's weight."""
        raise NotImplementedError(f"{type(self).__name__} needs takes(layer).")
