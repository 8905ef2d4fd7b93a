"""Runs whose checkpoints earlier versions have written: ``python -m earlier_states FILE`` with one of them installed.

Gradients come from a generator, not from a model, so that the numbers are the same on every machine.
"""

import gzip
from copy import deepcopy
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from sparsetrain import SparseTraining

TOTAL, STOP, AFTER = 20, 9, 5
HEAD = {"preset": "fst", "warmup": 4, "dense_tail": 6, "refresh_every": 2}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fst": ({**HEAD, "decay": "auto"}, {"track_age": True}),
    "asp_one_shot": ({"preset": "asp_one_shot", "prune_at": 9, "restart_lr": True}, {"schedule": True}),
    "iterative": ({"preset": "iterative", "start": 2, "every": 5, "count": 2}, {}),
    "slope": ({"preset": "slope", "adapter_rank": 2, "adapter_start": 4}, {}),
    "s_ste": ({"preset": "s_ste", "warmup": 2}, {}),
    "step": ({"preset": "step", "latest": 6, "earliest": 5}, {}),
}


class Run:
    """One of the runs: from its beginning, or from a checkpoint."""

    def __init__(self, name: str, saved: dict[str, Any] | None = None) -> None:
        method, options = RUNS[name]
        self.model = _model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)
        schedulers = [torch.optim.lr_scheduler.StepLR(self.optimizer, 4, 0.5)] if "schedule" in options else []
        options = {key: value for key, value in options.items() if key != "schedule"}
        self.schedulers = schedulers
        if saved is not None:
            self.model.load_state_dict(saved["model"])
        self.training = SparseTraining(
            self.model, self.optimizer, method, TOTAL, lr_schedulers=schedulers, verbose=False, **options
        )
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            for scheduler, state in zip(schedulers, saved["schedulers"], strict=True):
                scheduler.load_state_dict(state)
            self.training.load_state_dict(saved["training"])

    def go_on(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=generator) / 8
            self.optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def checkpoint(self) -> dict[str, Any]:
        return deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict(),
                "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
                "training": self.training.state_dict(),
            }
        )


def write(path: str) -> None:
    """Store every run's checkpoint, and its weights some steps later."""
    found = {}
    for name in RUNS:
        run = Run(name)
        run.go_on(0, STOP)
        saved = run.checkpoint()
        run.go_on(STOP, STOP + AFTER)
        found[name] = {"saved": saved, "weights": run.weights()}
    with gzip.open(path, "wb") as file:
        torch.save(found, cast("IO[bytes]", file))


def read(path: Path) -> dict[str, Any]:
    """Return what was stored."""
    with gzip.open(path) as file:
        found: dict[str, Any] = torch.load(cast("IO[bytes]", file), weights_only=True)
    return found


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model
