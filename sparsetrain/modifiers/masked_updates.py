"""What masks do to a step beside the optimizer's update: before it, or inside it where the optimizer can do both."""

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch.optim import Optimizer

from ..checks.rules import NOT_NEGATIVE, mapping
from ..checks.states import require_part
from ..kernels.adamw import Rule
from ..layers.masked_layer import MaskedLayer
from ..layers.masked_step import MaskedStep, TakesMaskedSteps
from ..masks.gradient_rules import resolve_gradient_rule
from ..methods.method import Method
from ..types import PhaseKind
from .base import Entry, Modifier, Resumed, Run, Setup, Step, Updated
from .masked_decay import MaskedDecay


class MaskedUpdates(Modifier):
    """Decays or masks gradients before an optimizer's step, or has the optimizer do it (:class:`TakesMaskedSteps`).

    Args:
        method: Of the run.
        decay: λ of the run.

    Example:
        >>> from sparsetrain.methods import fst
        >>> MaskedUpdates(fst(decay=0.1), MaskedDecay(0.1)).state_dict()
        {'value': 0.1}
    """

    name = "decay"

    def __init__(self, method: Method, decay: MaskedDecay) -> None:
        self._method, self._decay = method, decay
        self._masks_gradient = resolve_gradient_rule(method.frozen_gradient).pruned == 0
        self._told: dict[TakesMaskedSteps, MaskedStep] = {}

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for every method, as masks change gradients without a decay too."""
        method = run.method
        return cls(method, MaskedDecay(method.decay, method.decay_on, run.steps(method.decay_ramp)))

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Take over the run's length, of which the ramp may be a fraction."""
        self._decay.ramp = run.steps(self._method.decay_ramp)

    def before_step(self, run: Run, step: Step) -> None:
        """Do to weights or final gradients what comes before the update, or have the optimizer do it."""
        self.drop_step(step.optimizer)  # one that failed
        in_head = run.phase == "dense"
        names = run.pulled if in_head else run.active
        if not names:
            return
        active = names if step.gradients.keys() >= names else names & step.gradients.keys()
        layers = run.groups.chosen(run.layers, active)
        inside = {} if in_head else self._inside(run, step.optimizer, layers)
        outside = {name: layer for name, layer in layers.items() if name not in inside} if inside else layers
        for group in run.groups.of(outside):
            own = [step.gradients[name] for name in group.layers]
            if run.phase == "sparse" or in_head:
                self._decay.apply_(step.optimizer, group, own, run.decay_age, run.clock, step.scale)
            elif self._masks_gradient:
                group.apply_masks_(own)

    def after_update(self, optimizer: Optimizer) -> Updated:
        """Say which layers the optimizer has packed and masked itself."""
        done = self._take_back(optimizer)
        return Updated() if done is None else Updated(done.packed, done.layers if done.zeros else ())

    def drop_step(self, optimizer: Optimizer) -> None:
        """Take back what an optimizer was told."""
        self._take_back(optimizer)

    def after_search(self, flip_rate_ratio: Callable[[], float | None]) -> None:
        """Change an automatic λ."""
        if self._decay.automatic:
            self._decay.adapt(flip_rate_ratio())

    def metrics(self, run: Run) -> dict[str, float | None]:
        """Return λ of the next step, 0 where nothing is pulled, if there is a decay."""
        if not self._method.decay:
            return {"decay": None}
        pulls = run.pulled if run.phase == "dense" else run.active if run.phase == "sparse" else ()
        return {"decay": self._decay.at(run.decay_age) if pulls else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Return λ."""
        return {"value": self._decay.value}

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged; changes nothing."""
        require_part(self.name, state, mapping({"value": NOT_NEGATIVE}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned; a constant λ stays that of the method."""
        if self._decay.automatic:
            self._decay.value = float(state["value"])

    def detach(self) -> None:
        """Take back what optimizers were told before a step that failed."""
        for optimizer in [*self._told]:
            self._take_back(optimizer)

    def _take_back(self, optimizer: Optimizer | TakesMaskedSteps) -> MaskedStep | None:
        """Return what an optimizer was told, and tell it no longer; None if it was told nothing."""
        if not isinstance(optimizer, TakesMaskedSteps) or optimizer not in self._told:
            return None
        optimizer.masked_step = None
        return self._told.pop(optimizer)

    def _inside(self, run: Run, optimizer: Optimizer, layers: Mapping[str, MaskedLayer]) -> Mapping[str, MaskedLayer]:
        """Return the layers that the optimizer decays, masks and packs itself, and tell it to."""
        if not isinstance(optimizer, TakesMaskedSteps) or optimizer.masked_step is not None:  # another run told it
            return {}
        inside = {name: layer for name, layer in layers.items() if optimizer.takes(layer)}
        decay = self._decay.at(run.decay_age) if run.phase == "sparse" else 0.0
        zeros = run.phase == "frozen" and self._method.frozen_in_place
        rule, settled = self._rule(optimizer, run.phase, decay), not run.moves_at(run.clock + 1)
        if inside:
            factor = self._method.lr_factor
            self._told[optimizer] = optimizer.masked_step = MaskedStep(
                inside, rule, decay, run.clock, zeros, settled, factor
            )
        return inside

    def _rule(self, optimizer: Optimizer, phase: PhaseKind, decay: float) -> Rule:
        if phase == "frozen":
            return "mask_gradient" if self._masks_gradient else "none"
        if not decay:
            return "none"
        return self._decay.rule_of(optimizer)
