"""A higher learning rate for layers with masks, whatever the optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, train
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import sparsetrain as st
from sparsetrain.methods import PRESETS
from sparsetrain.optim import SparseAdamW
from sparsetrain.recipes.muon import MuonWithAdamW

FACTOR, RATE = 3.0, 1e-2


def muon(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    biases = [parameter for group in groups for parameter in group["params"] if parameter.dim() == 1]
    weights = [parameter for group in groups for parameter in group["params"] if parameter.dim() == 2]
    return MuonWithAdamW(weights, biases, **options)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda groups, **options: SGD(groups, momentum=0.5, **options),
    "AdamW": AdamW,
    "AdamW, one by one": lambda groups, **options: AdamW(groups, foreach=False, **options),
    "SparseAdamW": SparseAdamW,
    "Muon": muon,
}


def plain_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def method(**changes: Any) -> st.Method:
    return st.Method(**{"refresh_every": 2, "lr_factor": FACTOR, "schedule": st.from_scratch(0, 0), **changes})


def weights_after(model: nn.Module, optimizer: Optimizer, steps: int, rates: Callable[[int], float]) -> list[Any]:
    """Return all parameters after each step, the learning rate of group 0 set before each."""
    found = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rates(step)
        train(model, optimizer, 1, start=step)
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    return found


@pytest.mark.parametrize("decay_on", ["gradient", "weight", "share"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_with_masks_move_as_with_a_higher_rate(name: str, decay_on: Any) -> None:
    """A group of their own with that rate does the same; λ on weights is divided by it, as it is times the rate."""
    found = []
    for factor in (FACTOR, 1.0):
        model = mlp()
        weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
        biases = [layer.bias for layer in model if isinstance(layer, nn.Linear)]
        optimizer = OPTIMIZERS[name]([{"params": weights}, {"params": biases}], lr=RATE, weight_decay=0.1)
        decay = 0.25 / (FACTOR if decay_on == "weight" and factor == 1.0 else 1.0)
        own = method(lr_factor=factor, decay=decay, decay_on=decay_on)
        st.SparseTraining(model, optimizer, own, 12, verbose=False)
        found.append(weights_after(model, optimizer, 8, lambda _, factor=factor: RATE * FACTOR / factor))
    close = 1e-3 if name == "Muon" else 2e-6  # whose products are rounded to bfloat16
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close)


def test_it_begins_and_ends_with_the_masks() -> None:
    """A head in which masks pull and a tail are dense: the rates of a plain run say by how much weights move."""
    pulls = {"decay": 1e-9, "decay_on": "share", "decay_in_head": True, "schedule": st.from_scratch(2, 3)}
    ones, wanted = [1.0] * 10, [1.0] * 2 + [FACTOR] * 5 + [1.0] * 3
    found = []
    for factor, factors in ((FACTOR, ones), (1.0, wanted)):
        model = mlp()
        own = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
        rest = [layer.bias for layer in model if isinstance(layer, nn.Linear)]
        optimizer = SGD([{"params": own}, {"params": rest}], lr=RATE)
        st.SparseTraining(model, optimizer, method(lr_factor=factor, **pulls), 10, verbose=False)
        found.append(weights_after(model, optimizer, 10, lambda step, factors=factors: RATE * factors[step]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_frozen_weights_keep_their_zeros() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=RATE)
    training = st.SparseTraining(model, optimizer, method(schedule=st.from_scratch(2, 0, 8)), 12, verbose=False)
    train(model, optimizer, 12)
    assert training.phase == "frozen"
    assert training.metrics()["violations"] == 0
    assert all(int((layer.weight == 0).sum()) == layer.weight.numel() // 2 for layer in training.masks.layers.values())


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    """What it changed is not lengthened by the step after it."""
    model, plain = mlp(), mlp()
    for one in (model, plain):
        optimizer = SGD(one.parameters(), lr=RATE)
        training = st.SparseTraining(one, optimizer, method(), 12, verbose=False)
        train(one, optimizer, 2)
        if one is model:
            inner = optimizer._init_group
            optimizer._init_group = lambda *rest: 1 / 0
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            optimizer._init_group = inner
            for name in training.masks.layers:  # somebody loads other weights
                model.get_parameter(f"{name}.weight").data.add_(1.0)
        else:
            for name in training.masks.layers:
                plain.get_parameter(f"{name}.weight").data.add_(1.0)
        train(one, optimizer, 1, start=2)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_each_of_two_optimizers_moves_its_own() -> None:
    model, alone = mlp(), mlp()
    optimizers = [SGD(model[0].parameters(), lr=RATE), SGD(model[2].parameters(), lr=RATE)]
    st.SparseTraining(model, optimizers, method(), 12, verbose=False)
    single = SGD(alone.parameters(), lr=RATE)
    st.SparseTraining(alone, single, method(), 12, verbose=False)
    for step in range(4):
        for one, owned in ((model, optimizers), (alone, [single])):
            generator = torch.Generator().manual_seed(step)
            for parameter in one.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            for optimizer in owned:
                optimizer.step()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_that_moves_several_times_in_a_step_is_refused() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match=r"^optimizer is LBFGS but method has lr_factor=3.0, .*: set lr_factor=1, or"):
        st.SparseTraining(model, optimizer, method(), 12, verbose=False)
    assert type(model[0]) is nn.Linear
    st.SparseTraining(model, optimizer, method(lr_factor=1.0), 12, verbose=False)


def test_the_summary_says_it() -> None:
    for factor, words in ((1.5, " || their learning rate: ×1.5"), (1.0, "")):
        model = mlp()
        own = method(lr_factor=factor)
        training = st.SparseTraining(model, SGD(model.parameters(), lr=RATE), own, 12, verbose=False)
        assert training.report.summary().partition("2:4")[2] == words


def test_papers_methods_have_the_optimizers_rate() -> None:
    assert {name for name, preset in PRESETS.items() if preset().lr_factor != 1} == {"recommended"}
