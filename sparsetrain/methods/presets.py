"""Presets by name: functions that return a :class:`Method` with the published defaults."""

from collections.abc import Callable
from typing import Any, Literal, get_args

from ..checks.rules import FLAG, one_of, require
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
    refit: bool = True,
    lr_factor: float = 2.0,
) -> Method:
    """Where to begin: a dense head in which a growing pull empties what masks prune, then moving masks; it ends 2:4.

    Args:
        warmup: Length of the dense head, in steps (int) or as a fraction (float).
        decay: Share of a pruned weight that goes in a step; it grows from 0 to this over the head.
        freeze: For how long masks are frozen before the tail or the end, in steps (int) or as a fraction (float).
        dense_tail: Length of a dense tail, likewise, if the model may end dense.
        refresh_every: Optimizer steps between two mask searches.
        criterion: What ranks the entries; ``"auto"`` is ``"magnitude"`` from scratch or without a head, and
            ``"wanda"`` if pretrained.
        start: ``"scratch"``; ``"pretrained"``; or ``"auto"``: a model is pretrained if the gains of its norms are no
            longer alike. The run's summary says which.
        refit: If pretrained, nothing is emptied in the head; instead the entries that masks keep are moved by least
            squares, when masks come into force, to make up for those they prune.
        lr_factor: By which the learning rate of layers is multiplied while their masks are in force.

    Raises:
        ValueError: If a value is not allowed.

    Example:
        >>> recommended().schedule.resolve(1000).starts
        (0, 200)
        >>> recommended(start="pretrained").refit
        True

    Source: the numbers, part by part, in ``docs/methods/recommended.md``; a penalty that grows before what it empties
    is taken away: Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, arXiv 2012.09243; of pretrained
    models, see ``refit`` of :class:`Method`.
    """
    require_length("dense_tail", dense_tail)
    require("start", start, one_of(get_args(Start)))
    require("refit", refit, FLAG)
    chooses = isinstance(criterion, str) and criterion == "auto"
    changes: dict[str, Any] = {"criterion": "wanda"} if chooses else {}
    changes |= {"refit": True, "decay_in_head": False, "decay_ramp": 0} if refit else {}
    method = Method(
        name="recommended",
        criterion="magnitude" if chooses else criterion,
        schedule=from_scratch(warmup, dense_tail, freeze),
        refresh_every=refresh_every,
        decay=decay,
        decay_on="share",
        decay_ramp=warmup,
        decay_in_head=True,
        lr_factor=lr_factor,
        if_pretrained=changes if warmup else {},  # both need inputs that a head has seen
    )
    return method if start == "auto" else method.chosen(start == "pretrained")


PRESETS: dict[str, Callable[..., Method]] = {
    preset.__name__: preset
    for preset in (asp_one_shot, dense_to_sparse_finetune, fst, iterative, recommended, s_ste, slope, sr_ste, step)
}

DEFAULT_PRESET = "recommended"
"""Whose values a mapping changes that names no preset and has no schedule."""
