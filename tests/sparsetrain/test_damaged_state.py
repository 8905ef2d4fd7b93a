"""Damaged states: every one is refused with a sentence before anything is changed, or loads to a valid state."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from mutations import sampled
from support import mlp, train
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.methods import fst

SAMPLE = 6
"""Mutations under each key of a state; all of them are some fifty thousand."""

TOTAL = 20


class Recent(st.Criterion):
    """A user's criterion with a state of its own, which it does not check."""

    name = "recent"
    needs = frozenset({"gradient"})

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        return self.last.get(layer, weight).abs()

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        self.last[layer] = gradient.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"last": {name: value.clone() for name, value in self.last.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = {}
        for name, value in state["last"].items():
            self.last[name] = torch.zeros(32 if name == "0" else 16, 16 if name == "0" else 32).copy_(value)


@dataclass
class Run:
    """A run in the middle."""

    model: nn.Sequential
    optimizers: list[torch.optim.Optimizer]
    training: st.SparseTraining
    step: int

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def layers(self) -> dict[str, Any]:
        """All that a load can change in a layer."""
        return {
            name: {
                "codes": layer.mask_codes.clone(), "phase": layer.phase, "soft": copy.deepcopy(layer.soft_scale),
                "backward": None if layer.backward_codes is None else layer.backward_codes.clone(),
                "adapted": layer.adapter is not None, "rule": layer.gradient, "sparse": layer.is_two_of_four,
            }
            for name, layer in self.training.masks.layers.items()
        }  # fmt: skip

    def snapshot(self) -> Any:
        groups = [
            dict(sorted({**group, "params": list(map(id, group["params"]))}.items()))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        return self.training.state_dict(), self.weights(), self.layers(), copy.deepcopy(groups)

    def go_on(self) -> None:
        """One step, of every optimizer that is to step."""
        for optimizer in self.optimizers:
            if self.training.method.distillation:
                train(self.model, optimizer, 1, start=self.step, distilled=self.training.distilled)
            else:
                train(self.model, optimizer, 1, start=self.step)


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


def two(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1)]


HEAD = {"preset": "fst", "warmup": 4, "dense_tail": 6, "refresh_every": 2}
RUNS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "before the first mask": ({**HEAD, "criterion": "wanda"}, 3, {"watch_dense": False}),
    "fst in its head": ({**HEAD, "decay": "auto"}, 3, {"track_age": True}),
    "fst": ({**HEAD, "decay": "auto"}, 9, {"track_age": True}),
    "fst in its tail": (HEAD, 17, {}),
    "wanda": ({**HEAD, "criterion": "wanda"}, 9, {}),
    "movement between two optimizers": ({**HEAD, "criterion": "movement"}, 9, {"make": two, "half": True}),
    "a user's criterion": (lambda: replace(fst(warmup=3), criterion=Recent()), 9, {}),
    "asp_one_shot": ({"preset": "asp_one_shot", "prune_at": 4, "restart_lr": True}, 8, {"schedule": True}),
    "iterative": ({"preset": "iterative", "start": 2, "every": 6, "count": 2}, 5, {}),
    "iterative by density": ({"preset": "iterative", "start": 2, "every": 6, "by": "density"}, 5, {}),
    "slope": ({"preset": "slope", "adapter_rank": 2, "adapter_start": 4}, 8, {}),
    "s_ste": ({"preset": "s_ste", "warmup": 2, "mvue": True}, 6, {}),
    "step in its head": ({"preset": "step", "latest": 10, "earliest": 5}, 3, {}),
    "step": ({"preset": "step", "latest": 6, "earliest": 5}, 9, {}),
    "distillation": ({"preset": "dense_to_sparse_finetune", "distillation": 0.5}, 6, {}),
    "a dense layer": ({"preset": "recommended", "warmup": 2, "dense_budget": 0.6}, 6, {}),
    "dense tiles": ({"preset": "recommended", "warmup": 2, "dense_budget": 0.3, "dense_unit": "tiles"}, 6, {}),
}


def running(name: str) -> Run:
    method, steps, options = RUNS[name]
    options = dict(options)
    make, half, schedule = options.pop("make", adamw), options.pop("half", False), options.pop("schedule", False)
    model = mlp()
    optimizers = make(model)
    if schedule:
        options["lr_schedulers"] = [torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 0.01, TOTAL)]
    method = method() if callable(method) else method
    training = st.SparseTraining(model, optimizers, method, TOTAL, verbose=False, **options)
    run = Run(model, optimizers, training, 0)
    for step in range(steps):
        run.step = step
        run.go_on()
    if half:
        train(model, optimizers[0], 1, start=steps)
    run.step = steps
    return run


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor) and first.dtype == second.dtype
        return both and first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def try_all(run: Run, damages: list[tuple[str, Callable[[], Any]]]) -> tuple[int, int]:
    """Load every damaged state; return how many were refused and how many were valid."""
    training, refused = run.training, 0
    start = copy.deepcopy((run.training.state_dict(), run.weights(), [one.state_dict() for one in run.optimizers]))
    before = run.snapshot()
    for what, make in damages:
        damaged = make()
        try:
            training.load_state_dict(damaged)
        except ValueError as error:
            message = str(error)
            assert re.fullmatch("[^\n]*(state|checkpoint)[^\n]*[.]", message), (what, message)
            assert len(message) < 500, (what, message)
            assert same(run.snapshot(), before), what
            refused += 1
            continue
        metrics = training.metrics(per_layer=True)
        assert metrics["violations"] == 0, what
        state = training.state_dict()
        training.load_state_dict(copy.deepcopy(state))
        assert same(training.state_dict(), state), what
        run.go_on()
        assert training.metrics()["violations"] == 0, what
        run.model.load_state_dict(start[1])
        for optimizer, saved in zip(run.optimizers, copy.deepcopy(start[2]), strict=True):
            optimizer.load_state_dict(saved)
        training.load_state_dict(copy.deepcopy(start[0]))
        assert same(run.snapshot(), before), f"the state does not come back after {what}"
    return refused, len(damages) - refused


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:resuming with another:UserWarning")
def test_a_damaged_state_is_refused_before_anything_is_changed_or_loads_to_a_valid_one(name: str) -> None:
    run = running(name)
    refused, valid = try_all(run, sampled(run.training.state_dict(), SAMPLE, seed=len(name)))
    assert refused > valid > 0
