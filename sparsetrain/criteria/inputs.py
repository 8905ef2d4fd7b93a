"""Criteria of a layer's inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .statistics import MovingAverage


@dataclass(frozen=True)
class Wanda(MovingAverage):
    """Keep the largest ``|W|·‖X_j‖₂``: the weight times the norm of the input feature it multiplies.

    Of a convolution, the feature is the channel, over all positions.

    The squared norms of a step's inputs, over all tokens, micro-batches and data-parallel ranks, enter a moving
    average. An input counts when the backward of its forward runs, whatever the module's mode, so evaluation without
    gradients and recomputation do not.

    Args:
        beta: The share of the past in the average, at least 0 and below 1.

    Raises:
        ValueError: If ``beta`` is not allowed.

    Example:
        >>> criterion = Wanda(beta=0.75)
        >>> criterion.observe_input("fc", criterion.summarize_input(torch.tensor([[0.0, 2.0], [0.0, 0.0]])))
        >>> criterion.observe_step()
        >>> criterion.scores(torch.tensor([[5.0, -3.0]]), layer="fc", clock=1).tolist()
        [[0.0, 3.0]]

    Source: Sun et al. 2023, arXiv 2306.11695, which takes the norms over a calibration set.
    """

    name: ClassVar[str] = "wanda"
    needs: ClassVar[frozenset[str]] = frozenset({"input"})

    def summarize_input(self, input: Tensor) -> Tensor:
        """Return the squared norm of every feature, ``[..., I]`` to float32 ``[I]``."""
        dtype = input.dtype if input.dtype == torch.float64 else torch.float32
        # makes no copy of the input, whatever its dtype and its order in memory
        tokens = input.detach() if input.dim() > 1 else input.detach()[None]
        norms: Tensor = torch.linalg.vector_norm(tokens, dim=tuple(range(tokens.dim() - 1)), dtype=dtype)
        return norms.square().float()

    def observe_input(self, layer: str, summary: Tensor) -> None:
        """Note a step's squared norms; where one is not finite, the layer's whole step counts as zeros."""
        # an overflow in one batch must not stay in the average for ever
        self._noted[layer] = torch.where(summary.isfinite().all(), summary, torch.zeros_like(summary))

    def scores_from(self, weight: Tensor, statistic: Tensor) -> Tensor:
        """Return ``|W|·‖X_j‖₂``."""
        return weight.abs() * statistic.sqrt().repeat(weight.shape[1] // statistic.numel())  # at every kernel position
