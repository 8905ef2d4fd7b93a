"""``SelectionReport``: every layer of a model, sparse or dense with the reason."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from ..masked_layer import MaskedLayer

SHOWN = 3
"""Layers that the summary names before it counts the rest."""

NOT_IN_TARGETS = "not in targets"
"""The reason of a layer that nobody asked for."""


def first_few(words: Sequence[str]) -> str:
    """Return the first words and how many more there are.

    Example:
        >>> first_few(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


@dataclass(frozen=True)
class LayerChoice:
    """One layer's fate.

    Args:
        name: The layer's name in the model.
        shape: ``(O, I)``, or ``(O, I, *kernel)`` of a convolution, or ``(E, O, I)`` of stacked experts.
        reason: Why it stays dense; empty for a sparse layer.
        products: Backends of a sparse layer's products; empty if they are not chosen yet.
        is_named: Whether the targets ask for this layer rather than for a group of them.
        is_frozen: Whether its weight has ``requires_grad=False``, so that what is pruned in it cannot recover.
    """

    name: str
    shape: tuple[int, ...]
    reason: str = ""
    products: str = ""
    is_named: bool = False
    is_frozen: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether the layer becomes sparse."""
        return not self.reason

    @property
    def count(self) -> int:
        """Entries of the weight."""
        return math.prod(self.shape) if len(self.shape) >= 2 else 0


@dataclass(frozen=True)
class SelectionReport:
    """Every linear and convolutional layer of a model: sparse, or dense with the reason.

    Args:
        choices: One per layer, in the model's order.
        pattern: The pattern of the sparse layers.
        start: What the run begins from and takes from that, in words; empty if it makes no difference.
        lr_factor: By which the learning rate of the sparse layers is multiplied.

    Example:
        >>> from sparsetrain import select_layers
        >>> from torch import nn
        >>> report = select_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
        >>> print(report.summary())
        sparse layers: 1 of 2 || sparse weights: 64 of 88 (72.7 %) || pattern: transposable 2:4
    """

    choices: tuple[LayerChoice, ...]
    pattern: str = "transposable"
    start: str = ""
    lr_factor: float = 1.0

    @property
    def sparse(self) -> tuple[LayerChoice, ...]:
        """The layers that become sparse."""
        return tuple(choice for choice in self.choices if choice.is_sparse)

    @property
    def dense(self) -> tuple[LayerChoice, ...]:
        """The layers that stay dense."""
        return tuple(choice for choice in self.choices if not choice.is_sparse)

    @property
    def frozen(self) -> tuple[LayerChoice, ...]:
        """The layers that become sparse and have weights that are not trained."""
        return tuple(choice for choice in self.sparse if choice.is_frozen)

    def why_dense(self) -> str:
        """Return why layers in the targets stay dense: each reason after the first layers that have it."""
        layers: dict[str, list[str]] = {}
        for choice in self.dense:
            if choice.reason != NOT_IN_TARGETS:
                layers.setdefault(choice.reason, []).append(repr(choice.name))
        reasons = [f"{first_few(names)}: {reason}" for reason, names in layers.items()]
        more = len(reasons) - SHOWN
        return "; ".join(reasons[:SHOWN]) + (f"; and {more} more reason{'s' * (more > 1)}" if more > 0 else "")

    def summary(self) -> str:
        """Return one line: counts, and the names of layers that are not trained or were asked for and stay dense."""
        sparse, total = (sum(choice.count for choice in group) for group in (self.sparse, self.choices))
        line = (
            f"sparse layers: {len(self.sparse)} of {len(self.choices)} || "
            f"sparse weights: {sparse:,} of {total:,} ({100 * sparse / max(total, 1):.1f} %) || "
            f"pattern: {self.pattern.replace('_', '-')} 2:4"
        )
        if self.lr_factor != 1:
            line += f" || their learning rate: ×{self.lr_factor:g}"
        if self.start:
            line += f" || start: {self.start}"
        if self.frozen:
            line += f" || requires_grad=False: {first_few([repr(choice.name) for choice in self.frozen])}"
        denied = [f"{choice.name!r} ({choice.reason})" for choice in self.dense if choice.is_named]
        return f"{line} || stays dense: {first_few(denied)}" if denied else line

    def with_products(self, layers: Mapping[str, MaskedLayer], wires: Mapping[str, str] = {}) -> "SelectionReport":
        """Return the report with the backends of these layers' products, as decided by now, and how weights travel."""
        texts = {name: [layer.describe_products()] for name, layer in layers.items()}
        for name, wire in wires.items():
            texts[name].append(wire)
        choices = (
            replace(choice, products="; ".join(texts[choice.name])) if choice.name in layers else choice
            for choice in self.choices
        )
        return replace(self, choices=tuple(choices))

    def with_dense(self, names: Collection[str], reason: str) -> "SelectionReport":
        """Return the report with more layers that stay dense."""
        choices = (replace(choice, reason=reason) if choice.name in names else choice for choice in self.choices)
        return replace(self, choices=tuple(choices))

    def print_table(self, console: Console | None = None) -> None:
        """Print every layer with its shape and, where it stays dense, the reason."""
        table = Table("layer", "shape", "weights", title=self.summary())
        for choice in self.choices:
            shape = " × ".join(map(str, choice.shape))
            sparse = "sparse, not trained" if choice.is_frozen else "sparse"
            sparse = f"{sparse}: {choice.products}" if choice.products else sparse
            table.add_row(choice.name, shape, sparse if choice.is_sparse else f"dense: {choice.reason}")
        (console or Console()).print(table)

    def __str__(self) -> str:
        return self.summary()
