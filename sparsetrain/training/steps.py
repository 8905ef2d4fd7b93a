"""``Steps``: what a run does before and after every step of an optimizer."""

from torch import Tensor
from torch.optim import Optimizer

from ..modifiers.base import Step
from .masters import Masters
from .phases import Phases
from .step_hooks import StepHooks


class Steps:
    """Hangs on the optimizers of a run: adjusts final gradients, moves the clock, and brings masks and packing up.

    Args:
        phases: Of the run.
        masters: The layers' weights, and which optimizer owns each.
    """

    run: object = None
    """The run itself, which lives as long as its hooks do, whoever holds it."""

    def __init__(self, phases: Phases, masters: Masters) -> None:
        self._phases, self._masters = phases, masters
        self._run, self._modifiers = phases.run, phases.modifiers
        self._masked: set[str] = set()  # frozen layers that optimizers have masked themselves since the clock moved
        self._packed: set[str] = set()  # layers that an optimizer has packed in the step at hand
        self.hooks = StepHooks(
            phases.run.optimizers, self._adjust_gradients, self._updated, self._written, self._advance
        )

    def _adjust_gradients(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        """Item 1 of a step: gradients are unscaled (or ``scale`` says by how much they are not) and clipped."""
        self._phases.reshard_()
        replaced = self._masters.follow(optimizer)
        for name, (old, new) in replaced.items():
            for modifier in self._modifiers:
                modifier.follow(name, old, new)
        if replaced:
            self._run.groups.forget()
            self._phases.follow_shards()
        step = Step(optimizer, self._masters.gradients(optimizer), scale)
        for modifier in self._modifiers:
            modifier.before_step(self._run, step)

    def _updated(self, optimizer: Optimizer, has_stepped: bool) -> None:
        """Item 2 of a step: modifiers end what they began before it."""
        for modifier in self._modifiers:
            if has_stepped:
                packed, masked = modifier.after_update(optimizer)
                self._packed.update(packed)
                self._masked.update(masked)
            else:
                modifier.drop_step(optimizer)

    def _written(self, optimizer: Optimizer) -> None:
        """A step of one of several optimizers: packed weights of its layers that it did not pack are out of date."""
        left = self._masters.layers_of(optimizer)
        if self._packed:
            left = {name: layer for name, layer in left.items() if name not in self._packed}
            self._packed.clear()
        self._run.groups.invalidate(left, repacks=len(self._run.optimizers) == 1)

    def _advance(self) -> None:
        """Item 3 of a step: clock, phase, frozen masks, refresh, repack."""
        run, phases = self._run, self._phases
        run.clock += 1
        for modifier in self._modifiers:
            modifier.after_step(run)
        entered, moment = phases.enter(), object()
        due = not entered and run.age % run.method.refresh_every == 0
        if run.phase == "frozen" and not entered:
            phases.apply_masks_(run.active - self._masked if self._masked else run.active, moment)
            if due:
                phases.masks.refresh_backward()
        elif due and (run.phase == "sparse" or phases.is_watched):
            phases.refresh()
        self._masked.clear()
        phases.repack_(moment)
        run.groups.number_draws_(run.layers, run.clock)
