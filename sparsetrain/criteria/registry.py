"""Criteria by name."""

from ..suggestions import did_you_mean
from .gradients import Fisher, Movement, WeightGradient
from .inputs import Wanda
from .interface import Criterion
from .plain import Magnitude, Random

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
    if criterion not in CRITERIA:
        raise ValueError(
            f"criterion is {criterion!r}: it must be one of {sorted(CRITERIA)} or a Criterion instance"
            f"{did_you_mean(criterion, CRITERIA)}."
        )
    return CRITERIA[criterion]()
