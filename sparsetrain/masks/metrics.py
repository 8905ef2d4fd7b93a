"""Pruned-versus-kept magnitude metrics of a weight and its mask."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checks.tensors import require_floating, require_plain


@dataclass(frozen=True)
class PruneMetrics:
    """What a mask keeps and prunes of a weight, or of several together. Sums run over finite entries.

    Args:
        pruned_count: Pruned entries.
        total_count: All entries.
        approximation_error: Mean absolute difference between the weight and the masked weight.
        kept_magnitude_mean: Mean ``|w|`` of kept entries; 0 if there are none.
        pruned_magnitude_mean: Mean ``|w|`` of pruned entries; 0 if there are none.
        kept_fraction: ``Σ|W⊙M| / Σ|W|``; 1 if the weight is zero.
        nonfinite_count: NaN and infinite entries.
    """

    pruned_count: int
    total_count: int
    approximation_error: float
    kept_magnitude_mean: float
    pruned_magnitude_mean: float
    kept_fraction: float
    nonfinite_count: int

    @classmethod
    def from_sums(cls, sums: Iterable[float]) -> "PruneMetrics":
        """Make metrics of the five numbers of :func:`magnitude_sums`, or of their sums over layers."""
        kept_sum, pruned_sum, kept_count, total_count, nonfinite_count = sums
        pruned_count = total_count - kept_count
        magnitude = kept_sum + pruned_sum
        return cls(
            pruned_count=int(pruned_count),
            total_count=int(total_count),
            approximation_error=pruned_sum / max(total_count, 1),
            kept_magnitude_mean=kept_sum / max(kept_count, 1),
            pruned_magnitude_mean=pruned_sum / max(pruned_count, 1),
            kept_fraction=kept_sum / magnitude if magnitude else 1.0,
            nonfinite_count=int(nonfinite_count),
        )

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


@torch.no_grad()
def magnitude_sums(weight: Tensor, mask: Tensor) -> Tensor:
    """Return five float64 numbers on the weight's device, without waiting for it.

    Args:
        weight: Any shape, floating point.
        mask: bool, same shape.

    Returns:
        ``[5]``: kept ``Σ|w|``, pruned ``Σ|w|``, kept entries, all entries, non-finite entries.

    Example:
        >>> magnitude_sums(torch.tensor([3.0, -1.0]), torch.tensor([True, False])).tolist()
        [3.0, 1.0, 1.0, 2.0, 0.0]
    """
    finite = weight.isfinite()
    magnitude = weight.abs().masked_fill_(~finite, 0)
    total = magnitude.sum(dtype=torch.float64)
    kept = magnitude.masked_fill_(~mask, 0).sum(dtype=torch.float64)
    counts = torch.stack([mask.sum(), torch.full_like(mask.sum(), mask.numel()), (~finite).sum()])
    return torch.cat([torch.stack([kept, total - kept]), counts.to(torch.float64)])


def prune_metrics(weight: Tensor, mask: Tensor) -> PruneMetrics:
    """Measure what a mask keeps and prunes of a weight.

    Args:
        weight: Any shape, floating point; the dense master.
        mask: bool, same shape.

    Raises:
        TypeError: If the weight is no dense floating-point tensor, or the mask no dense tensor.
        ValueError: If the shapes differ or the mask is not bool.

    Example:
        >>> metrics = prune_metrics(torch.tensor([3.0, -1.0]), torch.tensor([True, False]))
        >>> metrics.kept_fraction, metrics.approximation_error, metrics.pruned_count
        (0.75, 0.5, 1)
    """
    require_floating("weight", weight)
    require_plain("mask", mask)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)} but weight is {tuple(weight.shape)}: "
            "mask must be bool and of the weight's shape."
        )
    return PruneMetrics.from_sums(magnitude_sums(weight, mask).tolist())


def total_metrics(sums: Iterable[Tensor]) -> PruneMetrics:
    """Combine the sums of several layers into one :class:`PruneMetrics`, with one transfer to the host.

    Example:
        >>> one = magnitude_sums(torch.tensor([3.0, -1.0]), torch.tensor([True, False]))
        >>> total_metrics([one, one]).total_count
        4
    """
    stacked = [entry.cpu() for entry in sums]
    return PruneMetrics.from_sums(torch.stack(stacked).sum(0).tolist() if stacked else [0.0] * 5)
