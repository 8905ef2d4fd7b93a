"""Presets by name: functions that return a :class:`Method` with the published defaults."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ..criteria import Criterion
from .method import Method
from .pretraining import fst, s_ste, slope, sr_ste, step
from .pruning import asp_one_shot, dense_to_sparse_finetune, iterative
from .schedule import from_scratch


def recommended(
    warmup: int | float = 0.15,
    decay: float | Literal["auto"] = 2e-3,
    freeze: int | float = 0.0,
    dense_tail: int | float = 0.0,
    refresh_every: int = 40,
    criterion: str | Criterion = "magnitude",
) -> Method:
    """Where to begin: a dense head, then moving transposable masks that a strong decay lets settle; it ends 2:4.

    Args:
        warmup: Length of the dense head, in steps (int) or as a fraction (float).
        decay: λ of the masked decay on gradients; about the peak learning rate.
        freeze: For how long masks are frozen before the tail or the end, likewise.
        dense_tail: Length of a dense tail, likewise, if the model may end dense.
        refresh_every: Optimizer steps between two mask searches.
        criterion: What ranks the entries.

    Example:
        >>> recommended().schedule.resolve(1000).starts
        (0, 150)

    Source: :func:`fst`, with the numbers that did best in ``docs/results/methods.md``, on a small model.
    """
    method = fst(refresh_every, decay, warmup, dense_tail, criterion=criterion)
    return replace(method, name="recommended", schedule=from_scratch(warmup, dense_tail, freeze))


PRESETS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (asp_one_shot, dense_to_sparse_finetune, fst, iterative, recommended, s_ste, slope, sr_ste, step)
}

DEFAULT_PRESET = "recommended"
"""Whose values a mapping changes that names no preset and has no schedule."""
