"""What the phases of a run do to weights, masks and moments."""

import copy
from typing import Any

import pytest
import torch
from models import adamw, convnet, mlp, sparse_run, train

import sparsetrain as st
from sparsetrain.methods import asp_one_shot, fst


def test_hysteresis_keeps_masks_where_the_gain_is_small() -> None:
    flips = {}
    for bonus in (0.0, 0.2):
        model = mlp()
        method = st.Method(refresh_every=1, hysteresis=bonus, schedule=st.from_scratch(0, 0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        training = st.SparseTraining(model, optimizer, method, 20, verbose=False)
        flips[bonus] = 0.0
        for step in range(20):
            previous = training.masks.layers["0"].mask
            weight = model[0].weight.detach()
            train(model, optimizer, 1, start=step)
            flips[bonus] += float((training.masks.layers["0"].mask != previous).sum())
            weight = model[0].weight.detach()
            scores = weight.abs() + bonus * weight.abs().mean() * previous
            assert torch.equal(training.masks.layers["0"].mask, st.transposable_mask(scores))
    assert flips[0.2] < flips[0.0]


def test_frozen_masks_may_leave_the_master_alone() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = st.Method(schedule=st.dense_prune_retrain(0), frozen_in_place=False)
    training = st.SparseTraining(model, optimizer, method, 5, verbose=False)
    before, mask = model[0].weight.detach().clone(), training.masks.layers["0"].mask
    train(model, optimizer, 5)
    assert torch.equal(model[0].weight[~mask], before[~mask])
    assert not torch.equal(model[0].weight[mask], before[mask])


def test_one_shot_clears_moments_and_keeps_pruned_weights_at_zero() -> None:
    model, optimizer, training = sparse_run(asp_one_shot(prune_at=3), 8)
    train(model, optimizer, 3)
    assert training.phase == "frozen"
    for layer in training.masks.layers.values():
        state = optimizer.state[layer.weight]
        assert not state["exp_avg"][~layer.mask].any()
        assert not state["exp_avg_sq"][~layer.mask].any()
        assert state["exp_avg"][layer.mask].any()
    codes = {name: layer.mask_codes.clone() for name, layer in training.masks.layers.items()}
    train(model, optimizer, 5, start=3)
    for name, layer in training.masks.layers.items():
        assert torch.equal(layer.mask_codes, codes[name])
        assert not layer.weight[~layer.mask].any()
    training.finish()
    assert (model[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("pattern", ["transposable", "row_wise"])
def test_masks_are_valid_at_every_step_and_move_only_when_due(pattern: str) -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=3, warmup=2, dense_tail=2, pattern=pattern), 14)
    previous = None
    for step in range(14):
        phase = "dense" if step < 2 or step >= 12 else "sparse"
        assert training.phase == phase
        codes = [layer.mask_codes.clone() for layer in training.masks.layers.values()]
        if phase == "sparse":
            assert training.metrics()["violations"] == 0
            for layer in training.masks.layers.values():
                assert (st.is_transposable if pattern == "transposable" else st.is_nm)(layer.mask)
            if (step - 2) % 3 and previous is not None:
                assert all(torch.equal(a, b) for a, b in zip(codes, previous, strict=True))
        previous = codes
        train(model, optimizer, 1, start=step)


def test_the_learning_rate_restarts_before_the_first_retraining_step() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    method = asp_one_shot(prune_at=3, restart_lr=True)
    with pytest.raises(ValueError, match="lr_schedulers is empty"):
        st.SparseTraining(model, optimizer, method, 6, verbose=False)
    training = st.SparseTraining(model, optimizer, method, 6, lr_schedulers=[scheduler], verbose=False)
    rates = []
    optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for step in range(6):
        train(model, optimizer, 1, start=step)
        scheduler.step()
    assert rates == [1.0, 0.5, 0.25, 1.0, 0.5, 0.25]
    assert training.phase == "frozen"


def test_dense_phases_are_watched_without_being_touched() -> None:
    watched, optimizer, training = sparse_run(asp_one_shot(prune_at=10), 12)
    plain = mlp()
    train(plain, adamw(plain), 6)
    train(watched, optimizer, 6)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    metrics = training.metrics()
    assert (metrics["sparse_layers"], metrics["violations"], metrics["sparse_flops_share"]) == (0, 0, 0)
    assert 0.5 < metrics["kept_fraction"] < 1


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("gradient", ["ste", "scaled"])
def test_a_compiled_model_trains_through_all_phases_as_an_eager_one(build: Any, gradient: str) -> None:
    phases = (st.Phase("dense", 2), st.Phase("sparse", 3), st.Phase("frozen", 3), st.Phase("dense", 2))
    rule = st.scaled(1.0, 0.5) if gradient == "scaled" else gradient
    method = st.Method(schedule=st.Schedule(phases), refresh_every=2, gradient=rule)
    weights = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        st.SparseTraining(model, optimizer, method, 10, ["all-linear"] if build is mlp else "all-conv", verbose=False)
        runner = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        train(runner, optimizer, 10)
        weights.append(copy.deepcopy(model.state_dict()))
    torch._dynamo.reset()
    for mine, theirs in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(mine, theirs)
