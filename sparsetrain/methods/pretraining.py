"""Presets that train sparse from the first steps on."""

from typing import Literal

from ..checks.rules import FLAG, require
from ..criteria import Criterion
from ..types import DecayTarget, WeightProduct
from .method import Method
from .schedule import Phase, Schedule, from_scratch, require_length


def fst(
    refresh_every: int = 40,
    decay: float | Literal["auto"] = 6e-5,
    warmup: int | float = 0.0,
    dense_tail: int | float = 1 / 6,
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    mvue: bool = False,
    decay_ramp: int | float = 0,
    hysteresis: float = 0.0,
) -> Method:
    """Fully sparse training from scratch: moving transposable masks, masked decay on gradients, a dense tail.

    Args:
        refresh_every: Optimizer steps between two mask searches.
        decay: λ of the masked decay on gradients; ``"auto"`` follows the ratio of flip rates and needs a dense head.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of the dense tail, likewise.
        pattern: ``"transposable"`` or ``"row_wise"``.
        criterion: What ranks the entries.
        mvue: Weight gradients from unbiased 2:4 estimates of output gradients, as in the paper.
        decay_ramp: In which λ grows from 0, in steps (int) or as a fraction of the run (float).
        hysteresis: Bonus of entries that are kept now, as a fraction of the layer's mean score.

    Example:
        >>> fst(warmup=0.15).schedule.resolve(600).starts
        (0, 90, 500)

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", ICML 2024, arXiv 2404.01847.
    """
    require_length("dense_tail", dense_tail)
    return Method(
        name="fst",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=refresh_every,
        decay=decay,
        weight_product=_weight_product(mvue),
        decay_ramp=decay_ramp,
        hysteresis=hysteresis,
    )


def slope(
    adapter_rank: int = 16,
    adapter_start: int | float = 0.99,
    adapter_merge: bool = True,
    refresh_every: int = 100,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """A static row-wise mask from the start, a double-pruned backward, and low-rank adapters in the last steps.

    Args:
        adapter_rank: Of the adapters; 0 for none.
        adapter_start: When they begin, in steps (int) or as a fraction of the run (float).
        adapter_merge: Add them to the weights at the end, which are dense then.
        refresh_every: Optimizer steps between two searches of the backward's masks.
        criterion: What ranks the entries of the initial weights: ``"magnitude"`` or ``"random"``.

    Example:
        >>> slope().schedule.resolve(1000).kinds, slope().pattern
        (('frozen',), 'double_pruned')

    Source: Mozaffari et al., "SLoPe: Double-Pruned Sparse Plus Lazy Low-Rank Adapter Pretraining of LLMs", ICLR 2025,
    arXiv 2405.16325.
    """
    return Method(
        name="slope",
        pattern="double_pruned",
        criterion=criterion,
        schedule=Schedule((Phase("frozen"),)),
        refresh_every=refresh_every,
        adapter_rank=adapter_rank,
        adapter_start=adapter_start,
        adapter_merge=adapter_merge,
    )


def sr_ste(
    decay: float = 2e-4,
    pattern: str = "row_wise",
    refresh_every: int = 1,
    decay_on: DecayTarget = "by_optimizer",
    warmup: int | float = 0.0,
    dense_tail: int | float = 0.0,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """Sparse training from scratch with a new mask every step and a decay of what is pruned.

    Args:
        decay: λ of the masked decay.
        pattern: ``"row_wise"``, as in the paper, or ``"transposable"``.
        refresh_every: Optimizer steps between two mask searches.
        decay_on: ``"by_optimizer"``: on weights with SGD, as in the paper, and on gradients otherwise, which Adam
            normalises together with the decay; or one of the two by name.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of a dense tail, likewise.
        criterion: What ranks the entries.

    Example:
        >>> sr_ste().refresh_every, sr_ste().decay_on
        (1, 'by_optimizer')

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021,
    arXiv 2102.04010.
    """
    require_length("dense_tail", dense_tail)
    return Method(
        name="sr_ste",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=refresh_every,
        decay=decay,
        decay_on=decay_on,
    )


def s_ste(
    pattern: str = "row_wise",
    warmup: int | float = 0.0,
    dense_tail: int | float = 0.0,
    mvue: bool = False,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """Sparse training from scratch with soft-thresholded weights; continuous, so it needs no decay and no dense tail.

    Args:
        pattern: ``"row_wise"``, as in the paper; ``"transposable"``, with a threshold along columns, is our extension.
        warmup: Length of a dense head, in steps (int) or as a fraction (float).
        dense_tail: Length of a dense tail, likewise.
        mvue: Compute weight gradients from unbiased 2:4 estimates of output gradients, as the paper does.
        criterion: What ranks the entries.

    Example:
        >>> s_ste().forward, s_ste().decay
        ('soft', 0.0)

    Source: Hu, Zhu, Chen, "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training", NeurIPS 2024,
    arXiv 2409.09099.
    """
    require_length("dense_tail", dense_tail)
    return Method(
        name="s_ste",
        pattern=pattern,
        criterion=criterion,
        schedule=from_scratch(warmup, dense_tail),
        refresh_every=1,
        forward="soft",
        weight_product=_weight_product(mvue),
    )


def step(
    latest: int | float = 0.5,
    earliest: int | float = 0.1,
    decay: float = 2e-4,
    pattern: str = "row_wise",
    refresh_every: int = 1,
    criterion: str | Criterion = "magnitude",
    freeze_second_moments: bool = True,
) -> Method:
    """A dense head that ends when Adam's second moments have settled, then sparse training with the moments frozen.

    Args:
        latest: Longest dense head, in steps (int) or as a fraction (float).
        earliest: Shortest dense head, likewise.
        decay: λ of the masked decay on gradients.
        pattern: ``"row_wise"``, as in the paper, or ``"transposable"``.
        refresh_every: Optimizer steps between two mask searches.
        criterion: What ranks the entries.
        freeze_second_moments: Keep Adam's second moments as they are at the end of the head; False lets Adam go on.

    Example:
        >>> step().schedule.resolve(1000).starts, step().schedule.resolve(1000).earliest
        ((0, 500), (100, None))

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", ICML 2023,
    arXiv 2302.01172.
    """
    require_length("latest", latest)
    return Method(
        name="step",
        pattern=pattern,
        criterion=criterion,
        schedule=Schedule((Phase("dense", latest, earliest=earliest), Phase("sparse"))),
        refresh_every=refresh_every,
        decay=decay,
        freeze_second_moments=freeze_second_moments,
    )


def _weight_product(mvue: bool) -> WeightProduct:
    require("mvue", mvue, FLAG)
    return "mvue" if mvue else "dense"
