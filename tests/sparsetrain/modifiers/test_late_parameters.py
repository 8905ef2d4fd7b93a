"""Optimizers own adapters while there are gradients of them: scalers see them, and no state that is saved has them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

import sparsetrain as st

STEPS = 8
SLOPE = {"preset": "slope", "adapter_rank": 2, "adapter_start": 2, "refresh_every": 3}


def start(optimizers: int = 1, **state: Any) -> tuple[nn.Sequential, list[Optimizer], st.SparseTraining]:
    """Return a run whose second layer comes first in its optimizers, with a rate of its own."""
    model = mlp()
    groups = [{"params": [*model[2].parameters()], "lr": 3e-2}, {"params": [*model[0].parameters()], "lr": 1e-2}]
    made: list[Optimizer] = [torch.optim.AdamW(groups)]
    if optimizers == 2:
        made = [torch.optim.AdamW(groups[:1]), torch.optim.SGD(groups[1:], momentum=0.9)]
    return model, made, st.SparseTraining(model, made, SLOPE, STEPS, verbose=False, **state)


def backward(model: nn.Module, number: int, scaled: Callable[[Tensor], Tensor] = Tensor.clone) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
    scaled((model(x) - x.flip(1)).square().mean()).backward()


def step(model: nn.Module, optimizers: list[Optimizer], first: int, last: int) -> None:
    for number in range(first, last):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, number)
        for optimizer in optimizers:
            optimizer.step()


def parts_of(training: st.SparseTraining) -> list[Tensor]:
    return [part for pair in training.adapters().values() for part in pair]


def owned(optimizers: list[Optimizer]) -> list[list[Tensor]]:
    return [[*group["params"]] for optimizer in optimizers for group in optimizer.param_groups]


def require_equal(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("optimizers", [1, 2])
def test_adapters_join_the_group_of_their_weight_for_the_time_of_a_step(optimizers: int) -> None:
    model, made, training = start(optimizers)
    dense = [[*model[2].parameters()], [*model[0].parameters()]]
    backward(model, 0)
    assert list(map(len, owned(made))) == [2, 2]  # they have not begun
    step(model, made, 0, 4)
    for found, wanted in zip(owned(made), dense, strict=True):
        assert all(one is other for one, other in zip(found, wanted, strict=True))
    backward(model, 4)
    pairs = training.adapters()
    for found, wanted in zip(owned(made), [[*dense[0], *pairs["2"]], [*dense[1], *pairs["0"]]], strict=True):
        assert all(one is other for one, other in zip(found, wanted, strict=True))
    moments = [made[0].state[part]["exp_avg"] for part in pairs["2"]]
    for optimizer in made:
        optimizer.step()
    saved = training.state_dict()["modifiers"]["adapters"]["optimizer"]
    require_equal([state["exp_avg"] for state in saved["2"]], moments)
    assert saved["0"][0].keys() == ({"step", "exp_avg", "exp_avg_sq"} if optimizers == 1 else {"momentum_buffer"})


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("accumulates", [False, True], ids=["between steps", "between two backwards"])
def test_what_an_optimizer_saves_is_the_state_of_a_dense_run(optimizers: int, accumulates: bool) -> None:
    model, made, training = start(optimizers)
    step(model, made, 0, 4)
    if accumulates:
        backward(model, 4)
    dense = [copy.deepcopy(optimizer.state_dict()) for optimizer in made]
    assert [len(group["params"]) for state in dense for group in state["param_groups"]] == [2, 2]
    assert sum(len(state["state"]) for state in dense) == 4
    weights, moments = get_state_dict(model, made)
    weights, moments, state = copy.deepcopy((weights, moments, training.state_dict()))
    step(model, made, 4, STEPS)
    for by_name in (True, False):
        other, theirs, resumed = start(optimizers, state=state)
        if by_name:
            set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=moments)
        else:
            other.load_state_dict(weights)
            for optimizer, saved in zip(theirs, dense, strict=True):
                optimizer.load_state_dict(saved)
        step(other, theirs, 4, STEPS)
        require_equal(dict(other.state_dict()), dict(model.state_dict()))
        require_equal(parts_of(resumed), parts_of(training))


def test_a_step_that_a_scaler_skips_leaves_optimizers_that_save_and_load_by_name() -> None:
    model, (optimizer,), training = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    norms = []
    for number in range(STEPS):
        optimizer.zero_grad()
        backward(model, number, scaler.scale)
        if number == 5:
            parts_of(training)[0].grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        every = [entry for group in optimizer.param_groups for entry in group["params"]]
        norms.append(float(torch.nn.utils.clip_grad_norm_(every, 1.0)))
        scaler.step(optimizer)
        scaler.update()
        assert training.clock == number + (number < 5)
        if number == 5:
            optimizer.zero_grad()
            before = copy.deepcopy(training.state_dict()["modifiers"]["adapters"])
            weights, moments = get_state_dict(model, optimizer)
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            require_equal(training.state_dict()["modifiers"]["adapters"], before)
    assert norms[5] == float("inf")
    assert all(norm < 100 for number, norm in enumerate(norms) if number != 5)  # adapters' gradients were unscaled


def test_gradients_that_are_assigned_are_followed() -> None:
    model, made, training = start()
    step(model, made, 0, 4)
    before = [part.detach().clone() for part in parts_of(training)]
    for parameter in [*model.parameters(), *parts_of(training)]:
        parameter.grad = torch.ones_like(parameter)
    made[0].step()
    assert not any(map(torch.equal, before, parts_of(training)))
    assert list(map(len, owned(made))) == [2, 2]


def test_a_run_that_is_finished_between_two_backwards_leaves_a_plain_optimizer() -> None:
    model, made, training = start()
    step(model, made, 0, 4)
    backward(model, 4)
    state = training.state_dict()["modifiers"]["adapters"]
    training.finish()
    require_equal(training.state_dict()["modifiers"]["adapters"], state)
    assert list(map(len, owned(made))) == [2, 2]
    assert len(made[0].state) == 4
    parts_of(training)[0].sum().backward()
    assert list(map(len, owned(made))) == [2, 2]


def test_a_copy_of_an_optimizer_owns_what_it_owned() -> None:
    model, made, _ = start()
    step(model, made, 0, 4)
    other = copy.deepcopy(made[0])
    assert [len(group["params"]) for group in other.param_groups] == [2, 2]
    other.load_state_dict(made[0].state_dict())


@pytest.mark.parametrize("late", [False, True], ids=["state first", "optimizer first"])
@pytest.mark.parametrize("apart", [False, True], ids=["in the optimizer", "apart"])
def test_moments_that_earlier_versions_saved_in_the_order_of_groups_come_back(apart: bool, late: bool) -> None:
    model, made, training = start()
    step(model, made, 0, 5)
    state, saved = training.state_dict(), copy.deepcopy(made[0].state_dict())
    adapters = state["modifiers"]["adapters"]
    known = [own for name in ("2", "0") for own in adapters["optimizer"][name]]
    old = {**state, "version": 5, "modifiers": {**state["modifiers"], "adapters": adapters["values"]}}
    if apart:
        old["apart"] = known
    else:
        first, second = saved["param_groups"]
        first["params"], second["params"] = [0, 1, 4, 5], [2, 3, 6, 7]
        saved["state"].update(zip((4, 5, 6, 7), known, strict=True))
    _, (optimizer,), other = start()
    if late:
        optimizer.load_state_dict(saved)
    other.load_state_dict(old)
    if not late:
        optimizer.load_state_dict(saved)
    require_equal(other.state_dict()["modifiers"]["adapters"], adapters)
    require_equal(optimizer.state_dict()["state"], made[0].state_dict()["state"])
