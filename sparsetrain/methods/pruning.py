"""Presets that prune what was trained dense, and train on."""

from typing import Literal

from ..criteria import Criterion
from .method import Method
from .schedule import Phase, Schedule, dense_prune_retrain, require_length, rounds


def asp_one_shot(
    prune_at: int | float = 0.5,
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    clear_moments: bool = True,
    restart_lr: bool = False,
    refit: bool = False,
) -> Method:
    """Dense training, one pruning, retraining with the mask frozen and pruned weights at zero.

    Args:
        prune_at: When to prune, in steps (int) or as a fraction (float); 0 prunes before the first step.
        pattern: ``"transposable"``, or ``"row_wise"`` as in the paper.
        criterion: What ranks the entries.
        clear_moments: Clear the optimizer's moments of pruned entries.
        restart_lr: Restart the learning-rate schedule for the retraining.
        refit: Move kept weights to make up for pruned ones, by least squares over the last inputs.

    Example:
        >>> asp_one_shot(prune_at=0).schedule.resolve(600).kinds
        ('frozen',)

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.
    """
    return Method(
        name="asp_one_shot",
        pattern=pattern,
        criterion=criterion,
        schedule=dense_prune_retrain(prune_at),
        clear_moments=clear_moments,
        restart_lr=restart_lr,
        refit=refit,
    )


def dense_to_sparse_finetune(
    decay: float = 1e-4,
    decay_ramp: int | float = 0.25,
    freeze_at: int | float = 0.75,
    refresh_every: int = 10,
    pattern: str = "row_wise",
    criterion: str | Criterion = "magnitude",
    distillation: float = 0.0,
    temperature: float = 2.0,
) -> Method:
    """Turn a trained dense model into a sparse one: moving masks under a growing decay, then frozen masks.

    Args:
        decay: λ of the masked decay on gradients.
        decay_ramp: In which λ grows from 0, in steps (int) or as a fraction of the run (float).
        freeze_at: When masks freeze, likewise.
        refresh_every: Optimizer steps between two mask searches.
        pattern: ``"row_wise"``, as in the papers, or ``"transposable"``.
        criterion: What ranks the entries.
        distillation: Share of the divergence from the dense model in the loss, 0 to 1, as
            :meth:`sparsetrain.SparseTraining.distilled` mixes it; AST has 0.67.
        temperature: T of the distillation, 2 in AST.

    Example:
        >>> dense_to_sparse_finetune().schedule.resolve(1000).kinds
        ('sparse', 'frozen')

    Source: Huang et al., "Pruning Large Language Models with Semi-Structural Adaptive Sparse Training", AAAI 2025,
    arXiv 2407.20584; mask period of CAST, arXiv 2509.25996.
    """
    require_length("freeze_at", freeze_at)
    return Method(
        name="dense_to_sparse_finetune",
        pattern=pattern,
        criterion=criterion,
        schedule=Schedule((Phase("sparse", freeze_at), Phase("frozen"))),
        refresh_every=refresh_every,
        decay=decay,
        decay_ramp=decay_ramp,
        distillation=distillation,
        distillation_temperature=temperature,
    )


def iterative(
    count: int | None = None,
    start: int | float = 0.25,
    every: int | float = 0.2,
    by: Literal["layers", "density"] = "layers",
    pattern: str = "transposable",
    criterion: str | Criterion = "magnitude",
    clear_moments: bool = True,
) -> Method:
    """Dense training, then rounds that each prune more and retrain with masks frozen.

    Args:
        count: Rounds. By layers: after round k, k / count of the layers are pruned, those that lose the least magnitude
            first; None is 3. By density there are two: 3:4, then 2:4.
        start: When the first round prunes, in steps (int) or as a fraction (float).
        every: From one round to the next, likewise.
        by: What grows: the share of ``"layers"`` that are pruned, or what all of them lose: ``"density"``.
        pattern: ``"transposable"`` or ``"row_wise"``.
        criterion: What ranks the entries.
        clear_moments: Clear the optimizer's moments of pruned entries.

    Example:
        >>> iterative().schedule.resolve(1000).starts
        (0, 250, 450, 650)

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv 1506.02626,
    with layers, or the two densities of four, as the rounds.
    """
    return Method(
        name="iterative",
        pattern=pattern,
        criterion=criterion,
        schedule=rounds(count, start, every, by),
        clear_moments=clear_moments,
    )
