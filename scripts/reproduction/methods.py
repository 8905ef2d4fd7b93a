"""What is compared: presets as they are published, and with the numbers that suit a short run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsetrain.methods import Method, resolve_method
from sparsetrain.methods.schedule import Phase, Schedule

from .controls import CONTROLS

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"schedule": [{"kind": "dense"}]},
    "dense, second moments frozen half-way": {"schedule": [{"kind": "dense"}], "moments_frozen_at": 0.5},
    "dense, twice the learning rate in sparse layers": {"schedule": [{"kind": "dense"}], "dense_lr_factor": 2.0},
    "recommended": {"preset": "recommended"},
    "recommended, dense tail 1/6": {"preset": "recommended", "dense_tail": 1 / 6},
    "recommended, last quarter frozen": {"preset": "recommended", "freeze": 0.25},
    "recommended, share 0.1": {"preset": "recommended", "decay": 0.1},
    "recommended, full share from the start": {"preset": "recommended", "decay_ramp": 0},
    "recommended, lr_factor 1": {"preset": "recommended", "lr_factor": 1.0},
    "recommended, lr_factor √2": {"preset": "recommended", "lr_factor": 2**0.5},
    "recommended, lr_factor 1, dense tail 1/6": {"preset": "recommended", "lr_factor": 1.0, "dense_tail": 1 / 6},
    "recommended, lr_factor 1, share grows in a fifth of the head": {
        "preset": "recommended",
        "lr_factor": 1.0,
        "decay_ramp": 0.04,
    },
    "recommended, lr_factor 1, share grows in a fifth of the head, dense tail 1/6": {
        "preset": "recommended",
        "lr_factor": 1.0,
        "decay_ramp": 0.04,
        "dense_tail": 1 / 6,
    },
    "recommended, lr_factor 1, no re-fit": {"preset": "recommended", "lr_factor": 1.0, "refit": False},
    "recommended, no pull in the head": {"preset": "recommended", "decay_in_head": False, "decay_ramp": 0},
    "recommended, no head": {"preset": "recommended", "warmup": 0.0},
    "recommended, head 10 %": {"preset": "recommended", "warmup": 0.1},
    "recommended, masks every 40 steps": {"preset": "recommended", "refresh_every": 40},
    "fst, head 15 %, λ 2e-3": {"preset": "fst", "warmup": 0.15, "decay": 2e-3},
    "fst, head 15 %, λ 2e-3, no tail": {
        "preset": "fst",
        "warmup": 0.15,
        "dense_tail": 0.0,
        "decay": 2e-3,
    },
    "fst, as published": {"preset": "fst"},
    "fst, head 15 %, automatic λ": {"preset": "fst", "warmup": 0.15, "decay": "auto", "refresh_every": 10},
    "fst, head 15 %, λ 2e-3, mvue": {"preset": "fst", "warmup": 0.15, "decay": 2e-3, "mvue": True},
    "sr_ste, row-wise": {"preset": "sr_ste"},
    "sr_ste, transposable, λ 2e-3": {"preset": "sr_ste", "pattern": "transposable", "decay": 2e-3},
    "s_ste, row-wise": {"preset": "s_ste"},
    "s_ste, transposable": {"preset": "s_ste", "pattern": "transposable"},
    "slope": {"preset": "slope"},
    "step": {"preset": "step"},
    "step, head 50 %": {"preset": "step", "earliest": 0.5},
    "step, head 50 %, moments go on": {"preset": "step", "earliest": 0.5, "freeze_second_moments": False},
    "asp_one_shot": {"preset": "asp_one_shot"},
    "asp_one_shot, re-fitted": {"preset": "asp_one_shot", "criterion": "wanda", "refit": True},
    "asp_one_shot, row-wise": {"preset": "asp_one_shot", "pattern": "row_wise"},
    "iterative": {"preset": "iterative"},
    "iterative, 3:4 then 2:4": {"preset": "iterative", "by": "density"},
    "dense_to_sparse_finetune, after 50 % dense": {"preset": "dense_to_sparse_finetune", "after_dense": 0.5},
    "dense_to_sparse_finetune, distilled, after 50 % dense": {
        "preset": "dense_to_sparse_finetune",
        "distillation": 0.67,
        "after_dense": 0.5,
    },
}
"""A row's name to the mapping that :func:`build` takes: a preset with its arguments, or the fields of a method."""


def build(entry: Mapping[str, Any]) -> Method:
    """Return the method of a row.

    Args:
        entry: What :func:`sparsetrain.methods.resolve_method` takes, and ``after_dense``: the share of the steps that
            are dense before the method, whose own fractions then are of the rest. :data:`CONTROLS` are passed over.
    """
    arguments = {key: value for key, value in entry.items() if key not in CONTROLS}
    share = arguments.pop("after_dense", 0.0)
    method = resolve_method(arguments)
    return after_dense(method, share) if share else method


def after_dense(method: Method, share: float) -> Method:
    """Return a method that trains dense for a share of the steps and then does in the rest what the method says.

    Raises:
        ValueError: If no steps are left for one of them.

    Example:
        >>> after_dense(resolve_method("dense_to_sparse_finetune"), 0.5).schedule.resolve(1000).starts
        (0, 500, 875)
    """
    if not 0 < share < 1:
        raise ValueError(f"after_dense is {share}: it must lie between 0 and 1 (share of the steps).")

    def scaled(length: Any) -> Any:
        return length * (1 - share) if isinstance(length, float) else length

    phases = [
        replace(phase, length=scaled(phase.length), earliest=scaled(phase.earliest)) for phase in method.schedule.phases
    ]
    start = method.adapter_start
    return replace(
        method,
        schedule=Schedule((Phase("dense", share), *phases)),
        decay_ramp=scaled(method.decay_ramp),
        adapter_start=share + scaled(start) if isinstance(start, float) else start,
    )
