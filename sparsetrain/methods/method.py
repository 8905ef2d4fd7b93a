"""``Method``: pattern, criterion, schedule, decay and gradient rules of a sparse training run."""

from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from ..backends.interface import WeightProduct
from ..criteria import Criterion, resolve_criterion
from ..gradient_rules import GradientRule, resolve_gradient_rule
from ..patterns import resolve_pattern
from ..schedule import Schedule, from_scratch


@dataclass(frozen=True)
class Method:
    """A complete description of sparse training; the engine knows nothing else.

    Args:
        name: Shown in logs.
        pattern: ``"transposable"`` or ``"row_wise"``.
        criterion: What ranks the entries of a weight: a name or a :class:`sparsetrain.Criterion`.
        schedule: The phases.
        refresh_every: Optimizer steps between two mask searches in a sparse phase.
        decay: λ of the masked decay ``g += λ·(1-M)⊙W`` in sparse phases; 0 turns it off.
        gradient: Rule of the weight gradient in sparse phases.
        frozen_gradient: Rule of the weight gradient in frozen phases.
        weight_product: ``"dense"``, or ``"mvue"``: the weight gradient from an unbiased 2:4 estimate of the output
            gradient, so that it can run sparse too.
        clear_moments: Clear the optimizer's moments of pruned entries when a mask freezes.
        restart_lr: Restart the learning-rate schedule when a mask freezes.

    Raises:
        ValueError: If a value is not allowed; the message names the field.

    Example:
        >>> Method(pattern="row_wise", refresh_every=10).decay
        0.0
    """

    name: str = "custom"
    pattern: str = "transposable"
    criterion: str | Criterion = "magnitude"
    schedule: Schedule = field(default_factory=from_scratch)
    refresh_every: int = 40
    decay: float = 0.0
    gradient: str | GradientRule = "ste"
    frozen_gradient: str | GradientRule = "masked"
    weight_product: WeightProduct = "dense"
    clear_moments: bool = False
    restart_lr: bool = False

    def __post_init__(self) -> None:
        resolve_pattern(self.pattern)
        resolve_criterion(self.criterion)
        resolve_gradient_rule(self.gradient)
        resolve_gradient_rule(self.frozen_gradient)
        if not isinstance(self.refresh_every, int) or self.refresh_every < 1:
            raise ValueError(
                f"refresh_every is {self.refresh_every!r}: it must be an int of at least 1 (optimizer steps)."
            )
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"decay is {self.decay!r}: it must be a finite number of at least 0.")
        if self.weight_product not in get_args(WeightProduct):
            raise ValueError(
                f"weight_product is {self.weight_product!r}: it must be one of {list(get_args(WeightProduct))}."
            )
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule is {self.schedule!r}: it must be a Schedule.")

    def describe(self) -> dict[str, Any]:
        """Return the method as plain numbers, strings, lists and dicts, for logs and checkpoints."""
        plain = asdict(self)
        plain["criterion"] = repr(resolve_criterion(self.criterion))
        for key in ("gradient", "frozen_gradient"):
            plain[key] = asdict(resolve_gradient_rule(getattr(self, key)))
        plain["schedule"] = [asdict(phase) for phase in self.schedule.phases]
        return plain
