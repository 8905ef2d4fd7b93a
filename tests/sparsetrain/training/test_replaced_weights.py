"""Weights, parameter groups and layers that are replaced in mid-run: followed if an optimizer owns them, or refused."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import mlp, train
from torch import Tensor, nn

import sparsetrain as st

STEPS = 12
METHODS: dict[str, Any] = {
    "moving masks": {"preset": "fst", "refresh_every": 3, "decay": 0.1, "warmup": 4, "dense_tail": 2},
    "frozen masks": {"preset": "asp_one_shot", "prune_at": 4},
    "soft threshold": {"preset": "s_ste"},
    "frozen moments": {"preset": "step", "latest": 4, "earliest": 4, "decay": 0.1},
    "inputs": {"preset": "asp_one_shot", "prune_at": 8, "criterion": "wanda"},
    "gradients": {"preset": "sr_ste", "warmup": 4, "criterion": "fisher"},
    "adapters": {"preset": "slope", "adapter_rank": 2, "adapter_start": 3, "refresh_every": 2},
}


def start(
    method: Any = METHODS["frozen masks"], kind: Callable[..., Any] = torch.optim.AdamW
) -> tuple[nn.Sequential, torch.optim.Optimizer, st.SparseTraining]:
    model = mlp(bias=False)
    optimizer = kind(model.parameters(), lr=1e-2)
    return model, optimizer, st.SparseTraining(model, optimizer, method, STEPS, verbose=False)


def own_instead(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    """Put a parameter and its state in another's place, as tools that convert models do."""
    for group in optimizer.param_groups:
        group["params"] = [new if entry is old else entry for entry in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def by_hand(model: nn.Sequential) -> None:
    for place in (0, 2):
        model[place].weight = nn.Parameter(model[place].weight.detach().clone())


def by_load(model: nn.Sequential) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@contextmanager
def overwriting() -> Iterator[None]:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def by_conversion(model: nn.Sequential) -> None:
    with overwriting():
        model.double().float()


WAYS = {"by hand": by_hand, "load_state_dict": by_load, "conversion": by_conversion}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_weight_that_an_optimizer_owns_is_followed(method: str, way: str) -> None:
    plain, plain_optimizer, plain_training = start(METHODS[method])
    model, optimizer, training = start(METHODS[method])
    train(plain, plain_optimizer, STEPS)
    for begin, steps in ((0, 2), (2, 4), (6, STEPS - 6)):  # once in a dense phase and once in a masked one
        train(model, optimizer, steps, start=begin)
        if begin + steps < STEPS:
            old = list(model.parameters())
            WAYS[way](model)
            for before, after in zip(old, model.parameters(), strict=True):
                assert before is not after
                own_instead(optimizer, before, after)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert training.clock == STEPS
    assert training.metrics()["violations"] == 0
    for training_of in (training, plain_training):
        training_of.finish()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_weight_that_no_optimizer_owns_is_refused_before_the_step(method: str, way: str) -> None:
    model, optimizer, training = start(METHODS[method])
    train(model, optimizer, 6)
    WAYS[way](model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"^layer '0' has a new weight that none of the run's optimizers owns, "):
        train(model, optimizer, 1, start=6)
    assert training.clock == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_values_that_are_written_are_no_new_weight() -> None:
    model, optimizer, training = start()
    train(model, optimizer, 2)
    model[0].weight.data = torch.randn(32, 16)
    model.load_state_dict(model.state_dict())
    train(model, optimizer, STEPS - 2, start=2)
    assert ((model[0].weight == 0).float().mean(), training.clock) == (0.5, STEPS)


@pytest.mark.parametrize(
    "new",
    [torch.zeros(16, 32), torch.zeros(64, 16), torch.zeros(32, 16, dtype=torch.float64)],
    ids=lambda w: str(w.dtype),
)
def test_a_new_weight_of_another_form_is_refused(new: Tensor) -> None:
    model, optimizer, training = start()
    train(model, optimizer, 2)
    old = model[0].weight
    model[0].weight = nn.Parameter(new)
    own_instead(optimizer, old, model[0].weight)
    with pytest.raises(
        RuntimeError, match=r"^layer '0' has a new weight \(\d+, \d+\) in torch\.float\d\d but the run "
    ):
        optimizer.step()
    assert training.clock == 2


def test_parameter_groups_may_grow_and_be_replaced() -> None:
    """Layers that are unfrozen late, as fine-tuning does: their gradients are masked like those of the others."""
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the first layer is frozen
        training = st.SparseTraining(model, optimizer, METHODS["frozen masks"], STEPS, verbose=False)
    train(model, optimizer, 6)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, 1, start=6)
    mask = training.masks.layers["0"].mask
    assert model[0].weight.grad[mask].all()
    assert not model[0].weight.grad[~mask].any()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": list(model.parameters())}]
    train(model, optimizer, 1, start=7)
    assert not model[0].weight.grad[~mask].any()
    optimizer.param_groups[0]["params"] = [entry for entry in model.parameters() if entry is not model[2].weight]
    with pytest.raises(RuntimeError, match=r"^layer '2' has a weight that none of the run's optimizers owns, "):
        train(model, optimizer, 1, start=8)
    assert training.clock == 8


def test_a_weight_may_change_its_optimizer() -> None:
    model = mlp()
    optimizers = [torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (0, 2)]
    training = st.SparseTraining(model, optimizers, METHODS["frozen masks"], STEPS, verbose=False)
    for step in range(STEPS):
        if step == 6:
            model[0].weight = nn.Parameter(model[0].weight.detach() + 1)
            optimizers[0].param_groups[0]["params"] = [model[0].bias]
            optimizers[1].add_param_group({"params": [model[0].weight]})
        model.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert training.clock == STEPS
    assert (model[0].weight == 0).float().mean() == 0.5
    assert not model[0].weight.grad[~training.masks.layers["0"].mask].any()


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_layer_that_was_replaced_is_refused_and_one_that_was_wrapped_is_not() -> None:
    model, optimizer, training = start()
    train(model, optimizer, 2)
    model[0] = Wrapper(model[0])
    train(model, optimizer, 4, start=2)
    assert training.clock == 6
    assert (model[0].layer.weight == 0).float().mean() == 0.5
    model[2] = nn.Linear(32, 16)
    with pytest.raises(
        RuntimeError, match=r"^layer '2' is not in the model any more, so its mask would have no effect: "
    ):
        train(model, optimizer, 1, start=6)
    assert training.clock == 6


def test_what_is_said_at_the_end_is_of_the_weights_that_are_there() -> None:
    model, optimizer, training = start()
    train(model, optimizer, STEPS)
    model[0].weight = nn.Parameter(torch.ones(32, 16))
    training.finish()
    assert (model[0].weight == 0).float().mean() == 0.5
    assert "50.0 % zeros in 2 layers" in str(training.ending)
