"""``Phases``: what happens where a phase begins, and to masks and packed weights between two steps."""

from collections.abc import Collection, Sequence
from contextlib import nullcontext

from torch import nn

from ..distributed.peers import fsdp_modules, peers_of, reshard_
from ..distributed.world import has_group
from ..layers.sharded.gathering import settle_wires_, wires_in_words
from ..masks.gradient_rules import resolve_gradient_rule
from ..methods.schedule import UNKNOWN_LENGTH
from ..modifiers.base import Entry, Modifier, Run, Setup
from .mask_state import MaskState
from .timing import StepTimer


class Phases:
    """Enters the phase of the clock, searches masks, writes frozen ones, and has weights packed.

    Args:
        run: What modifiers see of the run; its phase is changed here alone.
        masks: Of its layers.
        modifiers: What its method switches on, in the order of calls.
        setup: What the run is made of.
    """

    def __init__(self, run: Run, masks: MaskState, modifiers: Sequence[Modifier], setup: Setup) -> None:
        self.run, self.masks, self.modifiers = run, masks, modifiers
        self._model, self._gather, self._group = setup.model, setup.gather, setup.group
        self._sharded: list[nn.Module] = []  # what FSDP2 was applied to, if that gathers layers' weights
        self.watch_dense = setup.watch_dense
        self.last_refresh = -1
        self.repack_ms = 0.0
        self.timer: StepTimer | None = None

    def enter(self) -> bool:
        """Enter the phase of the clock; return False if the run is in it."""
        run = self.run
        if run.timeline.index_at(run.clock) == run.phase_index:
            return False
        kind, _ = run.timeline.at(run.clock)
        kept = run.timeline.kept_at(run.clock)
        goes_on = kind == "frozen" and run.phase != "dense" and kept == self.masks.kept
        held = run.active if goes_on else frozenset()  # their masks stay
        searched = set(self.masks.maskable) - held
        for modifier in self.modifiers:
            modifier.leave_phase(run, kind, kept != self.masks.kept)
        run.phase, self.masks.kept = kind, kept  # what a search finds, and counts flips as
        if searched and (kind != "dense" or self.is_watched):
            self.refresh(searched if held else None)
        run.active = frozenset() if kind == "dense" else frozenset(self._choose_active(set(held)))
        self.settle(Entry(resumed=False, fresh=run.active - held))
        if kind == "frozen":
            self.apply_masks_(run.active)
        return True

    def settle(self, entry: Entry) -> None:
        """Tell layers and modifiers of the clock's phase and of the layers whose masks are in force."""
        run, masks = self.run, self.masks
        run.phase, run.phase_start = run.timeline.at(run.clock)
        run.phase_index = run.timeline.index_at(run.clock)
        rule = resolve_gradient_rule(run.method.frozen_gradient if run.phase == "frozen" else run.method.gradient)
        for name, layer in masks.layers.items():
            layer.phase, layer.gradient = run.phase if name in run.active else "dense", rule
            layer.is_2_4 = masks.kept == 2 and not masks.search.tile_budget
            layer.operands.managed = True
            if layer.phase == "dense" or not layer.is_2_4:
                layer.operands.release()
        self._pull()
        self.tell(entry)
        self.settle_wires()

    def settle_wires(self) -> None:
        """Have FSDP2 gather every layer's weight in the form that the phase allows."""
        settle_wires_(self._model, self.masks.layers, self._gather)
        self._sharded = fsdp_modules(self._model) if any(layer.shard for layer in self.masks.layers.values()) else []

    def follow_shards(self) -> None:
        """Do that for weights that may be sharded by now, and share what is averaged with those who do."""
        weights = [layer.weight for layer in self.masks.layers.values()]
        self.run.peers = self.masks.peers = peers_of(self._model, weights, self._group)
        self.settle_wires()

    def reshard_(self) -> None:
        """Have FSDP2 let go of all gathered weights, as they are out of date."""
        if self._sharded and has_group():
            reshard_(self._sharded)

    def retime(self, total_steps: int | None) -> None:
        """Set the length of the run: phases that have begun stay, later ones move.

        Raises:
            ValueError: If the run has taken more steps already.
        """
        run = self.run
        if total_steps is not None and total_steps < run.clock:
            raise ValueError(f"total_steps is {total_steps} but {run.clock} steps are taken: pass at least as many.")
        length = UNKNOWN_LENGTH if total_steps is None else total_steps
        run.timeline = run.timeline.retimed(run.method.schedule.resolve(length, cut=True), run.clock)
        run.total_steps = run.total_steps if total_steps is None else total_steps
        if not self.enter():
            self.tell(Entry(resumed=True))
        self.repack_()

    def tell(self, entry: Entry) -> None:
        """Tell modifiers of the phase again."""
        for modifier in self.modifiers:
            modifier.enter_phase(self.run, entry)

    @property
    def is_watched(self) -> bool:
        """Whether masks are searched in the dense phase of the clock, and the criterion has what it ranks by."""
        return (self.watch_dense or self.run.in_decayed_head) and self.masks.is_observed

    @property
    def wires(self) -> dict[str, str]:
        """In words, how FSDP2 gathers every layer's weight while its mask is in force, and why; {} if it does not."""
        return wires_in_words(self._model, self.masks.layers, self._gather)

    def refresh(self, names: Collection[str] | None = None) -> None:
        """Search masks now, of all layers that have some or of these."""
        run, masks = self.run, self.masks
        counted = run.phase == "sparse" and bool(masks.flips)
        with nullcontext() if self.timer is None else self.timer.part("refresh"):
            masks.refresh(run.clock, virtual=run.phase == "dense", names=names)
        self.last_refresh = run.clock
        self._pull()
        for modifier in self.modifiers if counted else ():  # not at a phase's first, whose flips are the dense one's
            modifier.after_search(masks.flip_rate_ratio)

    def _pull(self) -> None:
        """Let masks that were searched in a head pull at its weights, if the method says so."""
        run, masks = self.run, self.masks
        pulls = masks.exists and run.in_decayed_head
        if pulls and masks.dense is None:
            self._choose_active(set())  # what stays dense is not to be pulled
        run.pulled = frozenset(masks.maskable) if pulls else frozenset()

    def apply_masks_(self, names: frozenset[str], moment: object = None) -> None:
        """Write zeros into what these layers' masks prune, if the method freezes weights in place."""
        if self.run.method.frozen_in_place:
            groups = self.run.groups
            for group in groups.of(groups.chosen(self.run.layers, names)):
                group.apply_masks_(group.weights, moment)

    def repack_(self, moment: object = None) -> None:
        """Pack the weights for sparse products; ``moment`` is that of :meth:`LayerGroup.known`."""
        self.reshard_()  # what is gathered has other masks or weights
        with nullcontext() if self.timer is None else self.timer.part("repack"):
            self.repack_ms = self.run.groups.repack_(self.masks.layers, moment)

    def _choose_active(self, held: set[str]) -> set[str]:
        """Return the layers whose masks are in force: those that are, then those that lose the least magnitude."""
        masks, method = self.masks, self.run.method
        if masks.dense is None:
            by_layers = method.dense_budget if method.dense_unit == "layers" else 0.0
            masks.keep_dense_(masks.costliest_layers(self.run.clock, by_layers) if by_layers else ())
        return masks.least_costly_layers(held, self.run.timeline.share_at(self.run.clock))
