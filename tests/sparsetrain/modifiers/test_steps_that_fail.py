"""Steps that fail or are skipped, optimizers that several runs share, and hooks of others: nothing is left behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import sparsetrain as st
import sparsetrain.optim
from sparsetrain.modifiers.scaled_updates import ScaledUpdates
from sparsetrain.optim import SparseAdamW

RATE, STEPS = 1e-2, 12


def method(**changes: Any) -> st.Method:
    return st.Method(**{"refresh_every": 2, "lr_factor": 2.0, "schedule": st.from_scratch(2, 0), **changes})


def copies_in(training: st.SparseTraining) -> int:
    (found,) = (modifier for modifier in training._phases.modifiers if isinstance(modifier, ScaledUpdates))
    return len(found._before)


def fail_in(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a step that fails where the update would be."""

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(sparsetrain.optim, "sparse_adamw_", out_of_memory)
        if not isinstance(optimizer, SparseAdamW):
            patch.setattr(optimizer, "_init_group", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()


KINDS: tuple[Callable[..., Optimizer], ...] = (AdamW, SparseAdamW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_run_ends_behind_a_failed_step_trains_on(
    kind: Callable[..., Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), lr=RATE)
    training = st.SparseTraining(model, optimizer, method(), STEPS, verbose=False)
    train(model, optimizer, 4)
    fail_in(optimizer, monkeypatch)
    training.finish(zeros=False)
    assert copies_in(training) == 0
    plain = copy.deepcopy((model, optimizer.state_dict()))
    train(model, optimizer, 1)
    other = AdamW(plain[0].parameters(), lr=RATE)
    other.load_state_dict(plain[1])
    train(plain[0], other, 1)
    for ours, theirs in zip(model.parameters(), plain[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_set_back_behind_a_failed_step_has_its_dense_head_again(
    kind: Callable[..., Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = kind(model.parameters(), lr=RATE)
    training = st.SparseTraining(model, optimizer, method(), STEPS, verbose=False)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, 1)
    wanted = copy.deepcopy(list(model.parameters()))
    train(model, optimizer, 3, start=1)
    fail_in(optimizer, monkeypatch)
    for one, state in zip((model, optimizer, training), saved, strict=True):
        one.load_state_dict(state)
    train(model, optimizer, 1)
    for ours, theirs in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_skipped_step_keeps_no_copies() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=RATE, fused=True)  # which skips inside its step
    training = st.SparseTraining(model, optimizer, method(schedule=st.from_scratch(0, 0)), STEPS, verbose=False)
    scaler = torch.amp.GradScaler("cpu")
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(4, 16)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert copies_in(training) == 0
    assert training.clock == 2


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_share_an_optimizer(kind: Callable[..., Optimizer]) -> None:
    """Each layer moves as it does where each has an optimizer of its own."""
    models, alone = [mlp(seed=0), mlp(seed=1)], [mlp(seed=0), mlp(seed=1)]
    shared = kind([parameter for model in models for parameter in model.parameters()], lr=RATE)
    methods = [method(decay=0.25, decay_on="share"), method(lr_factor=3.0)]
    for model, own in zip(models, methods, strict=True):
        st.SparseTraining(model, shared, own, STEPS, verbose=False)
    optimizers = [AdamW(model.parameters(), lr=RATE) for model in alone]
    for model, optimizer, own in zip(alone, optimizers, methods, strict=True):
        st.SparseTraining(model, optimizer, own, STEPS, verbose=False)
    for step in range(6):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for optimizer in (shared, *optimizers):
            optimizer.zero_grad()
        for model in (*models, *alone):
            model(x).square().mean().backward()
        for optimizer in (shared, *optimizers):
            optimizer.step()
    for ours, theirs in zip(nn.ModuleList(models).parameters(), nn.ModuleList(alone).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_hooks_that_were_there_first_see_the_whole_step() -> None:
    model = mlp()
    optimizer, seen = SGD(model.parameters(), lr=RATE), list[Tensor]()
    optimizer.register_step_post_hook(lambda *_: seen.append(model[0].weight.detach().clone()))
    st.SparseTraining(model, optimizer, method(schedule=st.from_scratch(0, 0)), STEPS, verbose=False)
    for step in range(3):
        train(model, optimizer, 1, start=step)
        assert torch.equal(seen[-1], model[0].weight)


class Masters(Optimizer):
    """SGD on float32 weights of its own, which it then writes into those of the model."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter].setdefault("master", parameter.detach().float().clone())
                own -= group["lr"] * parameter.grad
                parameter.copy_(own)


@pytest.mark.parametrize(("kind", "entry"), [(Masters, "master"), (torch.optim.ASGD, "ax")])
def test_an_optimizer_that_holds_weights_itself_is_left_alone(kind: Callable[..., Optimizer], entry: str) -> None:
    found = []
    for factor in (3.0, 1.0):
        model = mlp()
        optimizer = kind(model.parameters(), lr=RATE)
        st.SparseTraining(model, optimizer, method(lr_factor=factor), STEPS, verbose=False)
        train(model, optimizer, 2)
        if factor == 3:
            words = rf"^optimizer {kind.__name__} holds weights itself \('{entry}' of layer '\d'\), .*: set lr_factor=1"
            with pytest.warns(UserWarning, match=words):
                train(model, optimizer, 1, start=2)
        else:
            train(model, optimizer, 1, start=2)
        train(model, optimizer, 4, start=3)  # which says nothing more
        found.append([*model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_a_momentum_that_is_mostly_weight_decay_is_no_copy() -> None:
    model = mlp()
    optimizer = SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1.0)  # it begins near the weight
    st.SparseTraining(model, optimizer, method(schedule=st.from_scratch(1, 0)), STEPS, verbose=False)
    train(model, optimizer, 1)
    for layer in (model[0], model[2]):
        weight = layer.weight
        assert (optimizer.state[weight]["momentum_buffer"] - weight).norm() < 0.5 * weight.norm()
    train(model, optimizer, 3, start=1)  # a warning would be an error
