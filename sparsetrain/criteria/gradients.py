"""Criteria of weight times gradient; gradients are unscaled and clipped, with nothing added to them."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .statistics import MovingAverage, StatisticCriterion


@dataclass(frozen=True)
class WeightGradient(MovingAverage):
    """Keep the largest moving average of ``|w·g|``: to first order, how much the loss changes without the entry.

    Args:
        beta: The share of the past in the average, at least 0 and below 1.

    Raises:
        ValueError: If ``beta`` is not allowed.

    Example:
        >>> import torch
        >>> criterion = WeightGradient(beta=0.5)
        >>> criterion.observe_gradient("fc", torch.tensor([[-2.0, 1.0]]), torch.tensor([[1.0, 3.0]]), None)
        >>> criterion.observe_step()
        >>> criterion.scores(torch.zeros(1, 2), layer="fc", clock=1).tolist()
        [[1.0, 1.5]]

    Source: SNIP, Lee et al. 2019, arXiv 1810.02340, which takes the gradient of one batch at the start.
    """

    name: ClassVar[str] = "weight_gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        """Note ``|w·g|``."""
        self._noted[layer] = _product(weight, gradient, scale).abs_()


@dataclass(frozen=True)
class Movement(StatisticCriterion):
    """Keep the largest ``-Σ w·g`` over all successful steps: entries that the updates move away from zero.

    Example:
        >>> import torch
        >>> criterion = Movement()
        >>> criterion.observe_gradient("fc", torch.tensor([[-2.0, 1.0]]), torch.tensor([[1.0, 3.0]]), None)
        >>> criterion.observe_step()
        >>> criterion.scores(torch.zeros(1, 2), layer="fc", clock=1).tolist()
        [[2.0, -3.0]]

    Source: movement pruning, Sanh et al. 2020, arXiv 2005.07683, without the learning rate of its scores, which
    changes no order.
    """

    name: ClassVar[str] = "movement"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        """Note ``-w·g``."""
        self._noted[layer] = _product(weight, gradient, scale).neg_()

    def count_(self, running: Tensor, noted: Tensor) -> None:
        """Add to the sum."""
        running.add_(noted)


@dataclass(frozen=True)
class Fisher(MovingAverage):
    """Keep the largest moving average of ``(w·g)²``: the squared first-order change of the loss without the entry.

    Args:
        beta: The share of the past in the average, at least 0 and below 1.

    Raises:
        ValueError: If ``beta`` is not allowed.

    Example:
        >>> import torch
        >>> criterion = Fisher(beta=0.5)
        >>> criterion.observe_gradient("fc", torch.tensor([[-2.0, 1.0]]), torch.tensor([[1.0, 3.0]]), None)
        >>> criterion.observe_step()
        >>> criterion.scores(torch.zeros(1, 2), layer="fc", clock=1).tolist()
        [[2.0, 4.5]]

    Source: Molchanov et al. 2019, arXiv 1906.10771, for single weights; the squared gradient is the diagonal of the
    empirical Fisher matrix.
    """

    name: ClassVar[str] = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        """Note ``(w·g)²``."""
        self._noted[layer] = _product(weight, gradient, scale).square_()


def _product(weight: Tensor, gradient: Tensor, scale: Tensor | None) -> Tensor:
    """Return w·g, ``[O, I]`` in float32, which is nobody else's."""
    product = weight.detach().float() * gradient.detach().float()
    return product if scale is None else product.div_(scale.to(product.device))
