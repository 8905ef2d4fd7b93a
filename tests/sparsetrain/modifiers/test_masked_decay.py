"""The decay of pruned weights as a run goes on: following flip rates, or growing."""

from typing import Any

import pytest
import torch
from models import mlp, train
from torch import nn

import sparsetrain as st
from sparsetrain.optim import SparseAdamW


def test_an_automatic_decay_follows_the_ratio_of_flip_rates() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = {"preset": "fst", "refresh_every": 2, "warmup": 6, "dense_tail": 0, "decay": "auto"}
    training = st.SparseTraining(model, optimizer, method, 40, verbose=False)
    expected, values = 1e-4, set()
    for step in range(40):
        before = training.metrics()
        train(model, optimizer, 1, start=step)
        after = training.metrics()
        if training.refreshed and before["clock"] >= 7:
            ratio = after["flip_rate"] / after["virtual_flip_rate"]
            expected *= 1.5 if ratio > 0.95 else 1 / 1.5 if ratio < 0.60 else 1
        if after["clock"] < 6:
            assert after["decay"] == 0  # nothing is pulled in its head
            continue
        assert after["decay"] == pytest.approx(expected)
        values.add(after["decay"])
    assert len(values) > 1


def test_the_logged_decay_is_that_of_the_next_step() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    method = {"preset": "recommended", "warmup": 4, "freeze": 3, "dense_tail": 3, "refresh_every": 2}
    training = st.SparseTraining(model, optimizer, method, 12, verbose=False)
    logged = [training.metrics()["decay"]]
    for step in range(11):
        train(model, optimizer, 1, start=step)
        logged.append(training.metrics()["decay"])
    assert logged == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0, 0, 0, 0, 0, 0]


def test_an_automatic_decay_needs_a_dense_phase_to_compare_with() -> None:
    model = mlp()
    start_auto = {"preset": "fst", "decay": "auto", "refresh_every": 4, "warmup": 7}
    with pytest.raises(ValueError, match=r"^decay is 'auto' but no dense phase .* a number for decay\.$"):
        st.SparseTraining(model, torch.optim.AdamW(model.parameters()), start_auto, 40, verbose=False)
    assert type(model[0]) is nn.Linear


def test_a_ramp_lets_the_decay_grow() -> None:
    method = st.Method(decay=0.1, decay_ramp=4, schedule=st.from_scratch(0, 0))
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = st.SparseTraining(model, optimizer, method, 10, verbose=False)
    mask = training.masks.layers["0"].mask
    for step in range(6):
        optimizer.zero_grad()
        (model[0](torch.zeros(1, 16)) * 0).sum().backward()
        model[2].weight.grad = torch.zeros_like(model[2].weight)
        optimizer.step()
        expected = 0.1 * min(1, (step + 1) / 4) * ~mask * model[0].weight.detach()
        torch.testing.assert_close(model[0].weight.grad, expected)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, SparseAdamW])
def test_a_share_of_pruned_weights_goes_whatever_the_learning_rate(kind: Any, rate: float) -> None:
    torch.manual_seed(0)
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    options: dict[str, Any] = {"lr": rate, "weight_decay": 0.0}
    optimizer, alone = kind(model.parameters(), **options), kind(plain.parameters(), **options)
    method = st.Method(decay=0.25, decay_on="share", refresh_every=100, schedule=st.from_scratch(0, 0))
    training = st.SparseTraining(model, optimizer, method, 10, verbose=False)
    for step in range(3):
        masks = {name: layer.mask for name, layer in training.masks.layers.items()}
        for name, parameter in plain.named_parameters():
            own = model.get_parameter(name)
            own.grad = torch.randn(own.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = own.grad.clone()
            mask = masks.get(name.removesuffix(".weight"))
            parameter.data -= 0.25 * parameter.detach() * ~mask if mask is not None and "weight" in name else 0
        optimizer.step()
        alone.step()
        for own, parameter in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own, parameter)


def head_method(**changes: Any) -> st.Method:
    schedule = st.from_scratch(6, 0)
    return st.Method(
        **{
            "decay": 0.5,
            "decay_on": "share",
            "decay_in_head": True,
            "refresh_every": 3,
            "schedule": schedule,
            **changes,
        }
    )


@pytest.mark.parametrize("watch_dense", [True, False])
@pytest.mark.parametrize("ramp", [0, 6])
def test_a_decay_in_the_head_pulls_at_dense_weights(ramp: int, watch_dense: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = head_method(decay_ramp=ramp)
    training = st.SparseTraining(model, optimizer, method, 12, watch_dense=watch_dense, verbose=False)
    weight, layer = model[0].weight, training.masks.layers["0"]
    for step in range(8):
        inputs = torch.randn(2, 16)
        dense = nn.functional.linear(inputs, weight, model[0].bias)
        assert torch.equal(model[0](inputs), dense) == (step < 6)
        assert layer.is_masked == (step >= 6)
        mask, before = layer.mask, weight.detach().clone()
        assert st.is_transposable(mask)
        train(model, optimizer, 1, start=step)
        share = 0.5 * min(1, (step + 1) / ramp) if ramp else 0.5
        torch.testing.assert_close(weight.detach(), before - share * before * ~mask)
    magnitude = weight.detach().abs()
    assert magnitude[~layer.mask].max() < 0.05 * magnitude[layer.mask].mean()


def test_a_decay_in_the_head_waits_for_a_criterions_statistics() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = st.SparseTraining(model, optimizer, head_method(criterion="fisher"), 12, verbose=False)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 3)
    assert torch.equal(model[0].weight, before)
    train(model, optimizer, 1, start=3)
    assert not torch.equal(model[0].weight, before)
    assert training.metrics()["clock"] == 4


def test_a_decay_in_the_head_spares_layers_that_are_to_stay_dense() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = st.SparseTraining(model, optimizer, head_method(dense_budget=0.5), 12, verbose=False)
    before = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in training.masks.layers}
    train(model, optimizer, 8)
    changed = {
        name for name, weight in before.items() if not torch.equal(weight, model.get_parameter(f"{name}.weight"))
    }
    assert changed == {name for name, layer in training.masks.layers.items() if layer.is_masked} != set(before)


def test_a_dense_tail_has_no_decay() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    st.SparseTraining(model, optimizer, head_method(schedule=st.from_scratch(2, 4)), 10, verbose=False)
    train(model, optimizer, 6)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 4, start=6)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": "auto"}, r"^decay is 'auto', which compares .* give a number\.$"),
        ({"decay": "auto", "decay_on": "gradient"}, r"^decay is 'auto', which compares .* give a number\.$"),
        ({"decay": 1.5}, r"^decay is 1\.5 with decay_on='share': it must be at most 1 .* so lower it\.$"),
        ({"decay_in_head": 1}, r"^decay_in_head is 1: it must be True or False"),
    ],
)
def test_decays_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        head_method(**changes)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_what_recommended_prunes_is_small_before_its_masks_come_into_force(kind: Any, scale: float) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-2 if kind is torch.optim.AdamW else 1e-2 / scale)
    training = st.SparseTraining(model, optimizer, "recommended", 200, verbose=False)
    for step in range(40):
        layer = training.masks.layers["0"]
        assert not layer.is_masked
        (scale * model(torch.randn(8, 16, generator=torch.Generator().manual_seed(step))).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.is_masked
    magnitude = layer.weight.detach().abs()
    assert magnitude[~layer.mask].mean() < 0.15 * magnitude[layer.mask].mean()
