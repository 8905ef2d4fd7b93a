"""Schedules: ordered phases in optimizer steps or fractions of the run, resolved to a timeline of steps.

A phase that begins where the run ends, such as the frozen one of ``prune_at=1.0``, comes into force after the last
step, so that every run ends as its last phase says.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..checks.rules import TOTAL_STEPS, instance, number, one_of, require, sequence, whole
from ..types import PhaseKind

ROUNDING = 1e-9
"""By which fractions of the run may add up to more than 1, because they are floating-point numbers."""

UNKNOWN_LENGTH = 2**50
"""Steps of a run whose length is not known yet: no fraction of it is ever reached."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        kind: ``"dense"`` (no mask), ``"sparse"`` (mask refreshed every period) or ``"frozen"`` (mask fixed).
        length: Optimizer steps (int), a fraction of the run (float), or None for what the others leave.
        share: Of the layers, those that lose the least magnitude first, whose masks are in force; the rest stays dense.
        kept: Of every four entries, how many masks keep: 2, or 3, which no sparse product can use.
        earliest: For a dense phase: it ends before its length, but not before this, once the optimizer's second moments
            have settled; steps (int) or a fraction (float).

    Raises:
        ValueError: If the kind is unknown, or another value is out of range.

    Example:
        >>> Phase("dense", 0.15)
        Phase(kind='dense', length=0.15, share=1.0, earliest=None, kept=2)
    """

    kind: PhaseKind
    length: int | float | None = None
    share: float = 1.0
    earliest: int | float | None = None
    kept: int = 2

    def __post_init__(self) -> None:
        require("phase kind", self.kind, one_of(get_args(PhaseKind)))
        require_length("length", self.length, optional=True)
        require_length("earliest", self.earliest, optional=True)
        if self.earliest is not None and (self.kind != "dense" or self.length is None):
            raise ValueError(
                f"earliest is {self.earliest!r} in a {self.kind} phase of length {self.length!r}: it needs a dense "
                "phase with a length, which is the latest end."
            )
        require("share", self.share, number("more than 0 and at most 1", lambda value: 0 < value <= 1))
        require("kept", self.kept, replace(whole(2, 3), allowed="2 or 3 (of every four entries, what masks keep)"))


@dataclass(frozen=True)
class Timeline:
    """A schedule in steps.

    Args:
        kinds: Kind of each phase.
        starts: First step of each phase; the first is 0. Phases that have no step begin where the next one does.
        shares: Of the layers, in each phase; empty if it is always all.
        earliest: First step at which each phase may end early, or None; empty if none may.
        kept: Of every four entries, how many masks keep in each phase, or would; empty if it is always 2.
    """

    kinds: tuple[PhaseKind, ...]
    starts: tuple[int, ...]
    shares: tuple[float, ...] = ()
    earliest: tuple[int | None, ...] = ()
    kept: tuple[int, ...] = ()

    def at(self, step: int) -> tuple[PhaseKind, int]:
        """Return the kind and first step of the phase that the forward of ``step`` (0-based) belongs to."""
        index = self.index_at(step)
        return self.kinds[index], self.starts[index]

    def index_at(self, step: int) -> int:
        """Return the number of the phase that the forward of ``step`` belongs to, counted from 0."""
        return bisect_right(self.starts, step) - 1

    @property
    def head(self) -> int | None:
        """Steps of the dense head, 0 if there is none; None if no mask ever comes into force."""
        return next((start for start in self.starts if self.at(start)[0] != "dense"), None)

    def retimed(self, other: "Timeline", step: int) -> "Timeline":
        """Return another timeline of the same schedule, in which what has begun by ``step`` began as it did here."""
        begun = self.index_at(step) + 1
        return replace(other, starts=(*self.starts[:begun], *(max(start, step) for start in other.starts[begun:])))

    def may_end_at(self, step: int) -> bool:
        """Return whether the phase of the step before may end now, before its time."""
        index = self.index_at(step - 1)
        earliest = self.earliest[index] if self.earliest else None
        return (
            earliest is not None and step >= earliest and index + 1 < len(self.starts) and step < self.starts[index + 1]
        )

    def ended_at(self, step: int) -> "Timeline":
        """Return the timeline in which the phase of the step before ends now; later ends stay where they are."""
        index = bisect_right(self.starts, step - 1)
        return replace(self, starts=(*self.starts[:index], step, *self.starts[index + 1 :]))

    def share_at(self, step: int) -> float:
        """Return the share of layers whose masks are in force in the phase of ``step``."""
        return self.shares[self.index_at(step)] if self.shares else 1.0

    def kept_at(self, step: int) -> int:
        """Return how many of every four entries masks keep in the phase of ``step``."""
        return self.kept[self.index_at(step)] if self.kept else 2


@dataclass(frozen=True)
class Schedule:
    """Phases in order.

    Args:
        phases: At least one; at most one without a length. The last goes on if training does.

    Raises:
        ValueError: If there is no phase, more than one has no length, or fractions are more than the run.

    Example:
        >>> Schedule((Phase("dense", 10), Phase("sparse"))).resolve(100).at(10)
        ('sparse', 10)
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        require("phases", self.phases, sequence(instance(Phase, "a Phase")))
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise ValueError("schedule has no phases: give it at least one Phase.")
        if sum(phase.length is None for phase in self.phases) > 1:
            raise ValueError("schedule has more than one phase without a length: give all but one a length.")
        fractions = [phase.length for phase in self.phases if isinstance(phase.length, float)]
        if sum(fractions) > 1 + ROUNDING:
            raise ValueError(
                f"the schedule's phases take {' + '.join(f'{length:g}' for length in fractions)} of the run, which is "
                "more than 1: shorten them."
            )

    @property
    def first_kind(self) -> PhaseKind:
        """The kind of the first phase that is meant to take time, even if a short run rounds it to no step."""
        return next((phase for phase in self.phases if phase.length != 0), self.phases[-1]).kind

    @property
    def needs_total(self) -> bool:
        """Whether the length of the run must be known."""
        return any(
            isinstance(phase.length, float)
            or isinstance(phase.earliest, float)
            or (phase.length is None and phase is not self.phases[-1])
            for phase in self.phases
        )

    def resolve(self, total_steps: int | None, cut: bool = False) -> Timeline:
        """Return the timeline for a run of ``total_steps`` optimizer steps.

        Args:
            total_steps: Of the whole run; None if nothing is a fraction of it.
            cut: Phases that do not fit into the run begin where it ends; False raises an error.

        Raises:
            ValueError: If the length is needed but unknown, or the phases do not fit into it.
        """
        require("total_steps", total_steps, TOTAL_STEPS)
        if total_steps is None and self.needs_total:
            raise ValueError(
                "total_steps is None but the schedule has fractions: pass total_steps, or give phases in steps."
            )
        if total_steps is not None and not cut:
            self._require_fit(total_steps)
        lengths = [self._steps(phase.length, total_steps) for phase in self.phases]
        rest = max(0, (total_steps or 0) - sum(length or 0 for length in lengths))
        starts: list[int] = []
        earliest: list[int | None] = []
        step = 0
        for phase, length in zip(self.phases, lengths, strict=True):
            starts.append(step if total_steps is None else min(step, total_steps))
            after = self._steps(phase.earliest, total_steps)
            earliest.append(None if after is None else starts[-1] + after)
            step += rest if length is None else length
        kinds = tuple(phase.kind for phase in self.phases)
        shares = tuple(phase.share for phase in self.phases)
        kept = tuple(self._with_dense_phases(kinds, [phase.kept for phase in self.phases]))
        return Timeline(
            kinds,
            tuple(starts),
            shares if set(shares) != {1.0} else (),
            tuple(earliest) if set(earliest) != {None} else (),
            kept if set(kept) != {2} else (),
        )

    def _require_fit(self, total_steps: int) -> None:
        """Raise ``ValueError`` if the phases take more steps than there are."""
        lengths = (phase.length or 0 for phase in self.phases)
        exact = sum(length * total_steps if isinstance(length, float) else length for length in lengths)
        if exact > total_steps * (1 + ROUNDING):
            raise ValueError(
                f"the schedule's phases take {exact:g} steps but total_steps is {total_steps}: "
                "shorten them or train longer."
            )

    @staticmethod
    def _with_dense_phases(kinds: Sequence[PhaseKind], kept: Sequence[int]) -> list[int]:
        """Give dense phases, whose masks are only watched, the density of the masked phase after them, or before."""
        found = list(kept)
        for index in reversed(range(len(kinds))):
            if kinds[index] == "dense" and len(kinds) > 1:
                found[index] = found[index + 1] if index + 1 < len(kinds) else found[index - 1]
        return found

    @staticmethod
    def _steps(length: int | float | None, total_steps: int | None) -> int | None:
        if isinstance(length, float):
            assert total_steps is not None
            return round(length * total_steps)
        return length


def from_scratch(warmup: int | float = 0.0, tail: int | float = 1 / 6, freeze: int | float = 0) -> Schedule:
    """Train sparse between a dense head and a dense tail.

    Args:
        warmup: Length of the dense head, in steps (int) or as a fraction (float).
        tail: Length of the dense tail, likewise.
        freeze: For how long masks are frozen before the tail, likewise.

    Raises:
        ValueError: If a length is out of range, or head and tail leave nothing for the masks.

    Example:
        >>> from_scratch(warmup=0.15).resolve(600)
        Timeline(kinds=('dense', 'sparse', 'dense'), starts=(0, 90, 500), shares=(), earliest=(), kept=())
    """
    require_length("warmup", warmup)
    require_length("tail", tail)
    require_length("freeze", freeze)
    fractions = all(isinstance(length, float) or length == 0 for length in (warmup, tail))
    if tail and not freeze and fractions and warmup + tail >= 1:
        raise ValueError(
            f"warmup is {warmup!r} and the dense tail {tail!r}: they leave no step to train sparse, so make their sum "
            "less than 1."
        )
    phases = [Phase("dense", warmup), Phase("sparse"), Phase("frozen", freeze), Phase("dense", tail)]
    return Schedule(tuple(phase for phase in phases if phase.length != 0))


def dense_prune_retrain(prune_at: int | float = 0.5) -> Schedule:
    """Train dense, prune once, retrain with the mask frozen.

    Args:
        prune_at: When to prune, in steps (int) or as a fraction (float); 0 prunes before the first step, 1.0 after the
            last one.

    Raises:
        ValueError: If it is out of range.

    Example:
        >>> dense_prune_retrain(0.5).resolve(600)
        Timeline(kinds=('dense', 'frozen'), starts=(0, 300), shares=(), earliest=(), kept=())
    """
    require_length("prune_at", prune_at)
    phases = [Phase("dense", prune_at), Phase("frozen")]
    return Schedule(tuple(phase for phase in phases if phase.length != 0))


def rounds(
    count: int | None = None,
    start: int | float = 0.25,
    every: int | float = 0.2,
    by: Literal["layers", "density"] = "layers",
) -> Schedule:
    """Train dense, then prune in rounds, each followed by retraining with frozen masks; each round prunes more.

    Args:
        count: Rounds. By layers: after round k, k / count of the layers are pruned, those that lose the least magnitude
            first; None is 3. By density there are two: 3:4, then 2:4.
        start: When the first round prunes, in steps (int) or as a fraction (float).
        every: From one round to the next, likewise; the last round's masks stay to the end.
        by: What grows: the share of ``"layers"`` that are pruned, or what all of them lose: ``"density"``.

    Raises:
        ValueError: If a length or the number of rounds is out of range.

    Example:
        >>> rounds(2, start=0.5, every=0.25).resolve(100).shares
        (1.0, 0.5, 1.0)
        >>> rounds(start=0.5, every=0.25, by="density").resolve(100).kept
        (3, 3, 2)
    """
    require_length("start", start)
    require_length("every", every)
    require("by", by, one_of(["layers", "density"], allowed="'layers' or 'density'"))
    if by == "density" and count not in (None, 2):
        raise ValueError(f"count is {count!r}: by density there are 2 rounds, 3:4 and 2:4, so leave count out.")
    count = 3 if count is None else count
    require("count", count, whole(1, of="rounds"))
    phases = [Phase("dense", start)] if start else []
    if by == "density":
        phases += [Phase("frozen", every, kept=3)]
    else:
        phases += [Phase("frozen", every, share=number / count) for number in range(1, count)]
    return Schedule((*phases, Phase("frozen")))


def require_length(name: str, length: int | float | None, optional: bool = False) -> None:
    """Raise ``ValueError`` unless ``length`` is a number of steps or a fraction."""
    if length is None and optional:
        return
    number = isinstance(length, int | float) and not isinstance(length, bool)
    if not number or not (0 <= length <= 1 if isinstance(length, float) else length >= 0):  # type: ignore[operator]
        raise ValueError(
            f"{name} is {length!r}: it must be an int of at least 0 (optimizer steps) or a float from 0 to 1 "
            "(fraction of the run)."
        )
