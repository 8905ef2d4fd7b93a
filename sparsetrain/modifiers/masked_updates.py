"""What masks do to a step beside the optimizer's update: before it, or inside it where the optimizer can do both."""

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from ..gradient_rules import resolve_gradient_rule
from ..kernels.adamw.reference import Rule
from ..layer_group import LayerGroups
from ..masked_layer import MaskedLayer
from ..methods.method import Method
from ..optim import MaskedStep, SparseAdamW
from ..types import PhaseKind
from .masked_decay import MaskedDecay


class MaskedSteps:
    """Decays or masks gradients before an optimizer's step, or has a :class:`SparseAdamW` do it.

    Args:
        method: Of the run.
        decay: λ of the run.
        groups: Of the run's layers.

    Example:
        >>> import torch
        >>> from sparsetrain import SparseLinear
        >>> from sparsetrain.methods import fst
        >>> layer = SparseLinear(8, 8)
        >>> optimizer = SparseAdamW(layer.parameters())
        >>> layer.weight.grad = torch.zeros(8, 8)
        >>> steps = MaskedSteps(fst(decay=0.1), MaskedDecay(0.1))
        >>> steps.before(optimizer, {"fc": layer}, {"fc": layer.weight.grad}, "sparse", 0, 0, None, settled=True)
        >>> optimizer.masked_step.rule
        'decay_gradient'
    """

    def __init__(self, method: Method, decay: MaskedDecay, groups: LayerGroups | None = None) -> None:
        self._decay = decay
        self._groups = groups or LayerGroups()
        self._masks_gradient = resolve_gradient_rule(method.frozen_gradient).pruned == 0
        self._in_place = method.frozen_in_place
        self.zeroed: set[str] = set()
        """Frozen layers whose weights have their zeros since the clock's last step."""

    def before(
        self, optimizer: Optimizer, layers: Mapping[str, MaskedLayer], gradients: Mapping[str, Tensor],
        phase: PhaseKind, age: int, clock: int, scale: Tensor | None, *, settled: bool,
    ) -> None:  # fmt: skip
        """Do to weights or final gradients what comes before the update, or have the optimizer do it.

        Args:
            optimizer: Whose step it is.
            layers: Name to layer whose mask is in force and whose weight has a gradient and is the optimizer's.
            gradients: Of those, by name.
            phase: Of the run: sparse or frozen.
            age: Steps since the phase began.
            clock: Steps since the run began.
            scale: By which gradients are multiplied, if they are.
            settled: Whether masks will stay as they are after the step, so that updated weights can be packed by them.
        """
        inside: dict[str, MaskedLayer] = {}
        if isinstance(optimizer, SparseAdamW):
            inside = {name: layer for name, layer in layers.items() if optimizer.takes(layer)}
            decay = self._decay.at(age) if phase == "sparse" else 0.0
            zeros = phase == "frozen" and self._in_place
            rule = self._rule(optimizer, phase, decay)
            optimizer.masked_step = MaskedStep(inside, rule, decay, clock, zeros, settled) if inside else None
        outside = {name: layer for name, layer in layers.items() if name not in inside} if inside else layers
        for group in self._groups.of(outside):
            own = [gradients[name] for name in group.layers]
            if phase == "sparse":
                self._decay.apply_(optimizer, group, own, age, clock, scale)
            elif self._masks_gradient:
                group.apply_masks_(own)

    def after(self, optimizer: Optimizer) -> set[str]:
        """Return the layers whose packed weights the optimizer's step has renewed."""
        if not isinstance(optimizer, SparseAdamW) or optimizer.masked_step is None:
            return set()
        done, optimizer.masked_step = optimizer.masked_step, None
        self.zeroed.update(done.layers if done.zeros else ())
        return done.packed

    def _rule(self, optimizer: Optimizer, phase: PhaseKind, decay: float) -> Rule:
        if phase == "frozen":
            return "mask_gradient" if self._masks_gradient else "none"
        if not decay:
            return "none"
        return "decay_gradient" if self._decay.is_on_gradients(optimizer) else "decay_weight"
