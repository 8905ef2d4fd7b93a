"""Which modifiers there are, and in which order the engine calls them."""

from collections.abc import Iterator

from .adapters import Adapters
from .base import Modifier, Run, Setup
from .criterion_observer import Observer
from .distillation import Distillation
from .frozen_moments import FrozenMoments
from .lr_restart import LRRestart
from .masked_updates import MaskedUpdates
from .moment_clearing import MomentClearing
from .moment_convergence import SecondMoments
from .refit import Refit
from .scaled_updates import ScaledUpdates
from .soft_scales import SoftScales

MODIFIERS: tuple[type[Modifier], ...] = (
    Distillation,  # refuses a step on a loss that was not mixed before anything of it is counted
    Observer,  # sees gradients as the task gives them
    Refit,  # after what copies a dense teacher, before what reads the weights of a phase
    Adapters,
    SecondMoments,  # sees them before the decay is added
    LRRestart,  # before learning rates are read
    MaskedUpdates,  # the last that changes gradients or weights before the optimizer does
    ScaledUpdates,  # after what pulls at weights, and what tells an optimizer which it updates itself
    SoftScales,  # writes what products saw into weights, before frozen masks are written
    FrozenMoments,
    MomentClearing,
)
"""Of what a :class:`sparsetrain.Method` can switch on, in the order of calls."""


def check_all(setup: Setup) -> None:
    """Raise ``ValueError`` if a modifier cannot be set up."""
    for kind in MODIFIERS:
        kind.check(setup)


def modifiers_of(run: Run, setup: Setup) -> Iterator[Modifier]:
    """Make the modifiers that a run's method switches on, in order."""
    for kind in MODIFIERS:
        found = kind.of(run, setup)
        if found is not None:
            yield found
