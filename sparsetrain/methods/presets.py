"""Presets by name: functions that return a :class:`Method` with the published defaults."""

from collections.abc import Callable
from typing import Literal, get_args

from ..checks.rules import one_of, require
from ..criteria import Criterion
from .method import Method
from .pretraining import fst, s_ste, slope, sr_ste, step
from .pruning import asp_one_shot, dense_to_sparse_finetune, iterative
from .schedule import from_scratch, require_length

Start = Literal["auto", "scratch", "pretrained"]
"""What a run begins from; ``"auto"`` looks at the model."""


def recommended(
    warmup: int | float = 0.2,
    decay: float = 0.5,
    freeze: int | float = 0.0,
    dense_tail: int | float = 0.0,
    refresh_every: int = 20,
    criterion: str | Criterion = "auto",
    start: Start = "auto",
) -> Method:
    """Where to begin: a dense head in which a growing pull empties what masks prune, then moving masks; it ends 2:4.

    Args:
        warmup: Length of the dense head, in steps (int) or as a fraction (float).
        decay: Share of a pruned weight that goes in a step; it grows from 0 to this in the head's first fifth.
        freeze: For how long masks are frozen before the tail or the end, in steps (int) or as a fraction (float).
        dense_tail: Length of a dense tail, likewise, if the model may end dense.
        refresh_every: Optimizer steps between two mask searches.
        criterion: What ranks the entries; ``"auto"`` is ``"magnitude"`` from scratch or without a head, and
            ``"wanda"`` if pretrained.
        start: ``"scratch"``; ``"pretrained"``; or ``"auto"``: a model is pretrained if the gains of its norms are no
            longer alike. The run's summary says which.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> recommended().schedule.resolve(1000).starts
        (0, 200)
        >>> recommended(start="pretrained").criterion
        'wanda'

    Source: the numbers that did best in ``docs/results/methods.md``; a penalty that grows before what it empties is
    taken away: Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, arXiv 2012.09243.
    """
    require_length("dense_tail", dense_tail)
    require("start", start, one_of(get_args(Start)))
    chooses = isinstance(criterion, str) and criterion == "auto"
    method = Method(
        name="recommended",
        criterion="magnitude" if chooses else criterion,
        schedule=from_scratch(warmup, dense_tail, freeze),
        refresh_every=refresh_every,
        decay=decay,
        decay_on="share",
        decay_ramp=warmup / 5 if isinstance(warmup, float) else warmup // 5,
        decay_in_head=True,
        if_pretrained={"criterion": "wanda"} if chooses and warmup else {},  # it is of what the head sees
    )
    return method if start == "auto" else method.chosen(start == "pretrained")


PRESETS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (asp_one_shot, dense_to_sparse_finetune, fst, iterative, recommended, s_ste, slope, sr_ste, step)
}

DEFAULT_PRESET = "recommended"
"""Whose values a mapping changes that names no preset and has no schedule."""
