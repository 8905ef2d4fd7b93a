"""What a run ends as: one line, with zeros counted in the weights that are really there."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..methods.method import Method
from ..methods.schedule import Timeline


@dataclass(frozen=True)
class Ending:
    """What the model is after a run.

    Args:
        what: ``"2:4"``, ``"3:4"``, one of them ``"but for its dense tiles"``, or ``"dense"``.
        reason: The rest of the line.
        as_planned: Whether the run ends as the last phase of its schedule says.
        zeros: Fraction of zeros in the weights of the layers whose masks were in force; of all, if there were none.

    Example:
        >>> print(Ending("2:4", "50.0 % zeros in 24 layers", True, 0.5))
        ends 2:4: 50.0 % zeros in 24 layers
    """

    what: str
    reason: str
    as_planned: bool
    zeros: float

    def __str__(self) -> str:
        return f"ends {self.what}: {self.reason}"


@dataclass(frozen=True)
class Progress:
    """How far a run came.

    Args:
        method: What it followed.
        timeline: Its phases, in steps.
        clock: Steps that were taken.
        total_steps: Of the whole run, if that is known.
    """

    method: Method
    timeline: Timeline
    clock: int
    total_steps: int | None

    @property
    def adapters(self) -> int | None:
        """The step at which adapters begin; None if there are none that are merged."""
        start = self.method.adapter_start
        if not (self.method.adapter_rank and self.method.adapter_merge):
            return None
        return round(start * (self.total_steps or 0)) if isinstance(start, float) else start

    @property
    def stopped(self) -> str:
        """What the schedule did not come to, as words; empty if its last phase has begun."""
        timeline, index = self.timeline, self.timeline.index_at(self.clock)
        if index + 1 < len(timeline.starts):
            start = timeline.starts[index + 1]
            what = _beginning(timeline, index, timeline.index_at(start))
        elif self.adapters is not None and self.clock < self.adapters:
            start, what = self.adapters, "its adapters begin"
        else:
            return ""
        total = "" if self.total_steps is None else f" of {self.total_steps}"
        when = f" at step {start}" if self.total_steps is None or start <= self.total_steps else ""
        return f"the schedule stopped at step {self.clock}{total}, before {what}{when}"

    @property
    def complete(self) -> bool:
        """Whether the masks are what they are to be in the last phase, and adapters have begun."""
        here, last = self.timeline.index_at(self.clock), len(self.timeline.starts) - 1
        late = self.adapters is not None and self.clock < self.adapters
        return not late and _masks(self.timeline, here) == _masks(self.timeline, last)


def ending(
    weights: Mapping[str, Tensor], masked: Collection[str], progress: Progress, written: bool, merged: bool
) -> Ending:
    """Look at the weights of a run that is over.

    Args:
        weights: Layer name to weight ``[O, K]``: of all layers that were selected, which are plain again.
        masked: Names of those whose masks were in force.
        progress: How far the run came.
        written: Whether zeros were written into them.
        merged: Whether adapters were added to them.
    """
    stopped = progress.stopped
    pruned = {name: weight for name, weight in weights.items() if name in masked} or weights
    entries = sum(weight.numel() for weight in pruned.values())
    zeros = sum(int((weight == 0).sum()) for weight in pruned.values()) / entries
    if not masked:
        reason = stopped or "its last phase is dense, as the schedule says"
        return Ending("dense", reason, progress.complete, zeros)
    most = max(int((weight != 0).reshape(len(weight), -1, 4).sum(2).amax()) for weight in pruned.values())
    kept = progress.timeline.kept_at(progress.clock)
    count = f"{100 * zeros:.1f} % zeros in {_layers(len(pruned))}"
    dense = len(weights) - len(pruned)
    rest = (f", {_layers(dense)} dense" if dense else "") + (f"; {stopped}" if stopped else "")
    if most <= kept:
        return Ending(f"{kept}:4", f"{count}{rest}", progress.complete, zeros)
    if not written:
        return Ending("dense", "finish(zeros=False) keeps the dense masters", False, zeros)
    if merged:
        return Ending("dense", "its adapters are merged into the weights, as the method says", True, zeros)
    if progress.method.mixes_tiles:
        return Ending(f"{kept}:4 but for its dense tiles", f"{count}{rest}", progress.complete, zeros)
    return Ending("dense", f"{count}, though their masks are in force", False, zeros)


def _beginning(timeline: Timeline, index: int, following: int) -> str:
    """Say what begins with a phase that follows another."""
    (_, share, kept), (masked, next_share, next_kept) = _masks(timeline, index), _masks(timeline, following)
    if not masked:
        return "its dense phase"
    if timeline.kinds[index] != "dense" and next_kept != kept:
        return f"masks keep {next_kept} of four"
    if timeline.kinds[index] != "dense" and next_share != share:
        return f"{100 * next_share:.0f} % of the layers are pruned"
    return "masks freeze" if timeline.kinds[following] == "frozen" else "masks come into force"


def _masks(timeline: Timeline, index: int) -> tuple[bool, float, int]:
    """Return whether masks are in force in a phase, in which share of the layers, and how many of four they keep."""
    if timeline.kinds[index] == "dense":
        return False, 0.0, 0
    return True, timeline.shares[index] if timeline.shares else 1.0, timeline.kept[index] if timeline.kept else 2


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
