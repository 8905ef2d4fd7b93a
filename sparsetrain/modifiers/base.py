"""``Modifier``: something that a method switches on beside its masks, and when the engine calls it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..criteria.criterion import Criterion
from ..distributed.layouts import Layout
from ..distributed.peers import Peers
from ..layers.layer_group import LayerGroups
from ..layers.masked_layer import MaskedLayer
from ..layers.sharded.gathering import GatherMode
from ..methods.method import Method
from ..methods.schedule import Timeline
from ..types import PhaseKind


class Setup(NamedTuple):
    """What a run is to be made of, as :class:`sparsetrain.SparseTraining` takes it; nothing is changed yet."""

    model: nn.Module
    method: Method
    timeline: Timeline
    optimizers: Sequence[Optimizer]
    lr_schedulers: Sequence[LRScheduler] = ()
    teacher: nn.Module | None = None
    logits_from: str = ""
    total_steps: int | None = None
    watch_dense: bool = True
    track_age: bool = False
    group: dist.ProcessGroup | None = None
    gather: GatherMode = "auto"


@dataclass
class Run:
    """What modifiers see of a run; the engine alone changes it, but for the timeline.

    Args:
        method: What it follows.
        layers: Name to sparse layer.
        optimizers: Those that own the layers' weights.
        criterion: Scores the entries of the weights.
        groups: The layers by device.
        peers: Processes whose gradients are averaged with those of this one.
        timeline: When phases begin.
        total_steps: Optimizer steps of the whole run; None if unknown.
        clock: Steps taken.
        phase: Of the clock.
        phase_start: The clock when it began.
        phase_index: Which of the timeline's it is; -1 before the first.
        active: Names of the layers whose mask is in force.
        pulled: Names of those whose masks pull at dense weights, in a head with a decay.
    """

    method: Method
    layers: Mapping[str, MaskedLayer]
    optimizers: Sequence[Optimizer]
    criterion: Criterion
    groups: LayerGroups
    peers: Peers
    timeline: Timeline
    total_steps: int | None
    clock: int = 0
    phase: PhaseKind = "dense"
    phase_start: int = 0
    phase_index: int = -1
    active: frozenset[str] = frozenset()
    pulled: frozenset[str] = frozenset()

    @property
    def in_decayed_head(self) -> bool:
        """Whether the clock is in a dense head in which the method's decay acts."""
        if self.phase != "dense" or not (self.method.decay_in_head and self.method.decay):
            return False
        head = self.timeline.head
        return head is not None and self.clock < head

    @property
    def decay_age(self) -> int:
        """Steps since the masked decay began."""
        return self.clock if self.method.decay_in_head else self.age

    @property
    def age(self) -> int:
        """Steps since the phase began."""
        return self.clock - self.phase_start

    def steps(self, length: int | float) -> int:
        """Return a length in steps, given in steps or as a fraction of the run."""
        return round(length * (self.total_steps or 0)) if isinstance(length, float) else length

    def moves_at(self, clock: int) -> bool:
        """Return whether a phase begins or a mask search is due at a clock."""
        due = self.phase == "sparse" and (clock - self.phase_start) % self.method.refresh_every == 0
        return due or self.timeline.index_at(clock) != self.phase_index


class Step(NamedTuple):
    """One step of an optimizer, about to be taken.

    Args:
        optimizer: Whose it is.
        gradients: Of its sparse layers, by name: clipped, with nothing added.
        scale: What they are multiplied by, a scalar tensor; None for 1.
    """

    optimizer: Optimizer
    gradients: Mapping[str, Tensor]
    scale: Tensor | None = None


class Updated(NamedTuple):
    """What an optimizer's own step has done of the engine's work: layers it packed, and layers it masked."""

    packed: Collection[str] = ()
    masked: Collection[str] = ()


class Entry(NamedTuple):
    """How a phase is entered.

    Args:
        resumed: Whether the run was in it already: it goes on from a state, or its length was changed.
        fresh: Layers whose mask comes into force now.
    """

    resumed: bool
    fresh: frozenset[str] = frozenset()


class Resumed(NamedTuple):
    """Where a run goes on from a state.

    Args:
        phase: Of the state's clock.
        active: Layers whose mask is in force.
        same: Whether the state is of the same method and length.
    """

    phase: PhaseKind
    active: Sequence[str]
    same: bool


class Modifier:
    """Something that a method switches on; every method here may be left as it is.

    The engine calls them in the order of :data:`sparsetrain.modifiers.registry.MODIFIERS`. In a step:
    :meth:`before_step` and :meth:`after_update`, or :meth:`drop_step`, for each optimizer, then :meth:`after_step`. At
    the end of a phase: :meth:`leave_phase`, a mask search and :meth:`after_search`, :meth:`enter_phase`.
    """

    name: ClassVar[str]
    """Of its part of a checkpoint, and of errors."""

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` if a run cannot be set up in this way; before anything is changed, on or not."""

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return the modifier of a run, or None if its method does not switch it on."""
        raise NotImplementedError(f"{cls.__name__} needs of(run, setup).")

    def attach(self) -> None:
        """Hang on layers and optimizers; before the model is compiled."""

    def follow(self, name: str, old: Tensor, new: Tensor) -> None:
        """Go on with a layer's new weight."""

    def before_step(self, run: Run, step: Step) -> None:
        """Look at or change final gradients; the step may still be skipped."""

    def after_update(self, optimizer: Optimizer) -> Updated:
        """Act right after an optimizer's successful step; say what it has done of the engine's work."""
        return Updated()

    def drop_step(self, optimizer: Optimizer) -> None:
        """Forget a step that was begun by :meth:`before_step` and skipped."""

    def after_step(self, run: Run) -> None:
        """Count a successful step, of every optimizer if there are several; the clock has moved, the phase has not."""

    def leave_phase(self, run: Run, upcoming: PhaseKind, regroups: bool) -> None:
        """Act before masks are searched for the upcoming phase, which may keep another number of every four."""

    def after_search(self, flip_rate_ratio: Callable[[], float | None]) -> None:
        """Act on a search of masks in force; who asks for its flip rate over that of dense training waits for a GPU."""

    def enter_phase(self, run: Run, entry: Entry) -> None:
        """Act in the run's phase, whose masks are in force; before frozen ones are written to the weights."""

    def mixed(self, loss: Tensor) -> Tensor:
        """Return the loss with something mixed in."""
        return loss

    def finish(self, run: Run) -> bool:
        """Write what is to stay into the weights; return whether that fills what masks pruned."""
        return False

    def adapters(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return low-rank adapters that it trains beside the weights, by layer name."""
        return {}

    def metrics(self, run: Run) -> dict[str, float | None]:
        """Return numbers to log; None for what there is not yet."""
        return {}

    def state_dict(self) -> Any:
        """Return the state as plain numbers, strings and tensors; None if there is none.

        Of sharded tensors it has the parts that lie here, of numbers those of the whole run.
        """
        return None

    def layouts(self) -> Mapping[tuple[str | int, ...], Layout]:
        """Return how tensors that its state may have are spread over processes, by their keys from the outside in."""
        return {}

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state, None if there is none, is damaged or of another run; changes nothing."""

    def load_state_dict(self, state: Any) -> None:
        """Take back what :meth:`state_dict` returned and :meth:`check_state` let pass; or None."""

    def detach(self) -> None:
        """Take everything off again."""
