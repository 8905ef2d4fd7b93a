from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from models import mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.distributed.wrappers import plain_optimizer

MOVING = {"preset": "fst", "refresh_every": 3, "decay": 0.05, "dense_tail": 0, "warmup": 2}
METHODS = {
    "masks move": MOVING,
    "frozen, rate restarts": {"preset": "asp_one_shot", "prune_at": 3, "restart_lr": True},
    "adapters": {"preset": "slope", "adapter_start": 3, "adapter_rank": 2},
    "frozen moments": {"preset": "step", "latest": 3, "earliest": None},
}


@pytest.fixture(autouse=True)
def _no_state_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def batch(number: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(number))


def loss_of(model: nn.Module, number: int) -> Tensor:
    x = batch(number)
    return (model(x) - x.flip(1)).float().square().mean()


class Run:
    """Two micro-batches a step, clipped, in Accelerate."""

    def __init__(self, accelerator: Accelerator, method: Any, seed: int = 0, late: bool = True) -> None:
        self.accelerator = accelerator
        model = mlp(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
        self.inner = optimizer
        if late:
            model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        self.training = st.SparseTraining(model, optimizer, method, 8, lr_schedulers=[schedule], verbose=False)
        if not late:
            model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        accelerator.register_for_checkpointing(self.training)

    def steps(self, start: int, stop: int) -> None:
        for number in range(2 * start, 2 * stop):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss_of(self.model, number))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                before = self.training.clock
                self.optimizer.step()
                assert self.training.clock - before == number % 2
                self.schedule.step()
                self.optimizer.zero_grad()


def optimizer_state(run: Run) -> list[Tensor]:
    return [value for state in run.inner.state.values() for value in state.values()]


def require_equal(first: Run, second: Run) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    codes = first.training.masks.codes, second.training.masks.codes
    assert list(codes[0]) == list(codes[1]) == ["0", "2"]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    states = optimizer_state(first), optimizer_state(second)
    assert len(states[0]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    whole = Run(accelerator, METHODS[name])
    whole.steps(0, 4)
    accelerator.save_state(str(tmp_path))
    whole.steps(4, 8)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    resumed = Run(accelerator, METHODS[name], seed=1)
    accelerator.load_state(str(tmp_path))
    resumed.steps(4, 8)
    require_equal(whole, resumed)


@pytest.mark.parametrize("late", [True, False], ids=["wrapped first", "wrapped later"])
def test_wrapped_optimizers_give_what_plain_ones_give(late: bool) -> None:
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=2), MOVING, late=late)
    run.steps(0, 8)
    assert run.training.clock == 8
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    training = st.SparseTraining(model, optimizer, MOVING, 8, verbose=False)
    for step in range(8):
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            (loss_of(model, number) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run.model.parameters(), strict=True))
    assert training.metrics()["kept_fraction"] == run.training.metrics()["kept_fraction"]


def test_steps_that_overflow_do_not_count() -> None:
    Accelerator(cpu=True)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    seen = []
    training = st.SparseTraining(model, wrapped, {**MOVING, "warmup": 0}, 8, verbose=False)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    for number in range(3):
        wrapped.zero_grad()
        scaler.scale(loss_of(model, number)).backward()
        if number == 1:
            model[0].weight.grad[0, 0] = float("inf")
        else:
            gradient = model[0].weight.grad / scaler.get_scale() + 0.05 * model[0].weight.detach() * ~model[0].mask
        wrapped.step()
        assert wrapped.step_was_skipped == (number == 1)
        if number != 1:
            torch.testing.assert_close(seen[-1], gradient)
    assert training.clock == 2


def test_gradients_of_adapters_are_cleared_where_the_model_alone_is_asked_to() -> None:
    weights = []
    for by_model in (False, True):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        st.SparseTraining(model, optimizer, METHODS["adapters"], 8, verbose=False)
        for number in range(8):
            (model if by_model else optimizer).zero_grad()
            loss_of(model, number).backward()
            optimizer.step()
        weights.append(model[0].weight)
    assert torch.equal(*weights)


class Lookahead(torch.optim.Optimizer):
    """An optimizer of its own, which happens to have another one inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step()


def test_only_wrappers_that_pass_steps_on_come_off() -> None:
    Accelerator(cpu=True)
    inner = torch.optim.SGD(mlp().parameters(), lr=0.1)
    assert plain_optimizer(AcceleratedOptimizer(AcceleratedOptimizer(inner))) is inner
    lookahead = Lookahead(inner)
    assert plain_optimizer(lookahead) is lookahead
    assert plain_optimizer(AcceleratedOptimizer(lookahead)) is lookahead
