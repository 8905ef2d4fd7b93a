"""What is compared: presets as they are published, and with the numbers that suit a short run."""

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"schedule": [{"kind": "dense"}]},
    "fst, as published": {"preset": "fst"},
    "fst, head 15 %, λ 2e-3": {"preset": "fst", "warmup": 0.15, "decay": 2e-3},
    "fst, head 15 %, λ 2e-3, no tail": {"preset": "fst", "warmup": 0.15, "decay": 2e-3, "dense_tail": 0},
    "fst, head 15 %, automatic λ": {"preset": "fst", "warmup": 0.15, "decay": "auto", "refresh_every": 10},
    "fst, head 15 %, λ 2e-3, mvue": {"preset": "fst", "warmup": 0.15, "decay": 2e-3, "mvue": True},
    "sr_ste, row-wise": {"preset": "sr_ste"},
    "sr_ste, transposable, λ 2e-3": {"preset": "sr_ste", "pattern": "transposable", "decay": 2e-3},
    "s_ste, row-wise": {"preset": "s_ste"},
    "s_ste, transposable": {"preset": "s_ste", "pattern": "transposable"},
    "asp_one_shot": {"preset": "asp_one_shot"},
    "asp_one_shot, row-wise": {"preset": "asp_one_shot", "pattern": "row_wise"},
    "iterative": {"preset": "iterative"},
}
