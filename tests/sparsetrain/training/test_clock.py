"""A successful optimizer step is the only clock of a run."""

from typing import Any

import pytest
import torch
from models import adamw, mlp, sparse_run, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import sparsetrain as st
from sparsetrain.methods import fst


def test_extra_forwards_evaluation_and_accumulation_do_not_move_the_clock() -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=2, dense_tail=0))
    train(model, optimizer, 1)
    codes = [layer.mask_codes.clone() for layer in training.masks.layers.values()]
    for _ in range(5):
        model(torch.randn(4, 16)).sum().backward()
    model.eval()(torch.randn(4, 16))
    assert training.clock == 1
    assert all(torch.equal(a, b.mask_codes) for a, b in zip(codes, training.masks.layers.values(), strict=True))


@pytest.mark.parametrize("keyword", [True, False])
def test_decay_enters_behind_what_a_closure_computes(keyword: bool) -> None:
    results = []
    for closures in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        st.SparseTraining(model, optimizer, fst(decay=0.1, dense_tail=0), verbose=False, total_steps=4)
        for step in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))

            def closure(x: torch.Tensor = x, model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                return loss

            if not closures:
                closure()
                optimizer.step()
            elif keyword:
                assert optimizer.step(closure=closure) is not None
            else:
                assert optimizer.step(closure) is not None
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    model, reference = mlp(), mlp()
    optimizer, plain = adamw(model, fused=fused), adamw(reference)
    training = st.SparseTraining(model, optimizer, fst(decay=0.1, dense_tail=0), 8, verbose=False)
    st.SparseTraining(reference, plain, fst(decay=0.1, dense_tail=0), 8, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            plain.zero_grad()
            reference(x).square().mean().backward()
            plain.step()
        assert training.clock == (step + 1 if step < 1 else step)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_several_optimizers_advance_one_clock() -> None:
    model = mlp()
    optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
    training = st.SparseTraining(model, optimizers, fst(dense_tail=0), 8, verbose=False)
    for step in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizers[0].step()
        assert training.clock == step
        optimizers[1].step()
        assert training.clock == step + 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_makes_room_for_a_loaded_state_is_none(optimizer: type[torch.optim.Optimizer]) -> None:
    model = mlp()
    owner = optimizer(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    training = st.SparseTraining(model, owner, {"preset": "asp_one_shot", "prune_at": 0}, 10, verbose=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.ones_like(weight))  # what is loaded
    get_state_dict(model, owner)
    assert training.clock == 0
    assert all(weight.all() for weight in model.parameters())
    model(torch.randn(4, 16)).square().mean().backward()
    owner.step()
    assert training.clock == 1
    assert not model[0].weight.all()


def test_a_first_step_without_a_learning_rate_is_one() -> None:
    model = mlp()
    owner = torch.optim.AdamW(model.parameters(), lr=0.0)
    training = st.SparseTraining(model, owner, "fst", 10, verbose=False)
    model(torch.randn(4, 16)).square().mean().backward()
    owner.step()
    assert training.clock == 1
