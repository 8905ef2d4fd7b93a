"""Criteria by name."""

from ..checks.rules import one_of, require
from .criterion import Criterion
from .gradients import Fisher, Movement, WeightGradient
from .inputs import Wanda
from .stateless import Magnitude, Random

CRITERIA: dict[str, type[Criterion]] = {
    criterion.name: criterion for criterion in (Magnitude, Random, WeightGradient, Movement, Fisher, Wanda)
}


def resolve_criterion(criterion: str | Criterion) -> Criterion:
    """Return a criterion from its name, or the criterion itself.

    Raises:
        ValueError: If no criterion has that name.

    Example:
        >>> resolve_criterion("magnitude")
        Magnitude()
    """
    if isinstance(criterion, Criterion):
        return criterion
    require("criterion", criterion, one_of(sorted(CRITERIA), " or a Criterion instance"))
    return CRITERIA[criterion]()
