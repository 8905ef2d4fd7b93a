"""Gradient rules: what of a masked layer's weight gradient reaches kept and pruned entries."""

from dataclasses import dataclass, field

from torch import Tensor

from ..checks.rules import FINITE, one_of, require
from ..kernels.tile_codes import unpack_codes
from .matrices import weight_of


@dataclass(frozen=True)
class GradientRule:
    """The weight gradient is ``kept·M⊙G + pruned·(1-M)⊙G`` with ``G = dYᵀ·X``.

    Args:
        kept: Factor on kept entries.
        pruned: Factor on pruned entries: 1 is the straight-through estimator, 0 masks the gradient.

    Raises:
        ValueError: If a factor is no finite number.

    Example:
        >>> GradientRule(kept=1.0, pruned=0.5)
        GradientRule(kept=1.0, pruned=0.5)
    """

    kept: float = 1.0
    pruned: float = 1.0

    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require("kept", self.kept, FINITE)
        require("pruned", self.pruned, FINITE)
        # compiled graphs are specialized on strings, but not on numbers that change from phase to phase
        names = {(1.0, 1.0): "ste", (1.0, 0.0): "masked"}
        object.__setattr__(self, "name", names.get((self.kept, self.pruned), "scaled"))

    def apply(self, gradient: Tensor, codes: Tensor) -> Tensor:
        """Return the scaled gradient, shaped like a weight or its matrix, for tile codes ``[O/4, K/4]``."""
        if self.name == "ste":
            return gradient
        kept = weight_of(unpack_codes(codes), gradient.shape)
        if self.name == "masked":
            return gradient.masked_fill(~kept, 0)
        return (gradient * self.kept).where(kept, gradient * self.pruned)


def scaled(kept: float, pruned: float) -> GradientRule:
    """Return the rule that scales the gradient of kept and of pruned entries.

    Example:
        >>> scaled(1.0, 0.25).pruned
        0.25
    """
    return GradientRule(kept, pruned)


GRADIENT_RULES = {"ste": GradientRule(1.0, 1.0), "masked": GradientRule(1.0, 0.0)}


def resolve_gradient_rule(rule: str | GradientRule, name: str = "gradient") -> GradientRule:
    """Return a rule from its name (``"ste"``, ``"masked"``), or the rule itself.

    Args:
        rule: The one or the other.
        name: Of the argument, for the message.

    Raises:
        ValueError: If no rule has that name.

    Example:
        >>> resolve_gradient_rule("masked")
        GradientRule(kept=1.0, pruned=0.0)
    """
    if isinstance(rule, GradientRule):
        return rule
    require(name, rule, one_of(GRADIENT_RULES, " or scaled(kept, pruned)"))
    return GRADIENT_RULES[rule]
