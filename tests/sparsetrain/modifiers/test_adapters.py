"""SLoPe's adapters, before they begin, after, merged or kept: against products and chain rule by hand."""

from collections.abc import Callable

import pytest
import torch
from models import adamw, mlp, train
from oracles import two_of_four, two_of_those
from simulated_backend import SimulatedBackend
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS

START, EVERY, STEPS, RANK = 5, 4, 12, 3


class Sgd:
    """With momentum; what has no gradient stays as it is."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        self.held[name] = 0.9 * self.held[name] + gradient if name in self.held else gradient
        return value - 0.05 * self.held[name]


class AdamW:
    """Every value counts its own steps."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, name: str, value: Tensor, gradient: Tensor) -> Tensor:
        count, m, v = self.held.get(name, (0, torch.zeros_like(value), torch.zeros_like(value)))
        count, m, v = count + 1, 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        self.held[name] = count, m, v
        scaled = (m / (1 - 0.9**count)) / ((v / (1 - 0.99**count)).sqrt() + 1e-8)
        return value - 1e-2 * 0.1 * value - 1e-2 * scaled


UPDATES: dict[str, tuple[Callable[[], Sgd | AdamW], Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "SGD": (Sgd, lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)),
    "AdamW": (
        AdamW,
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    ),
}


def forward(values: dict[str, Tensor], layer: int, x: Tensor, adapted: bool) -> Tensor:
    """``X·(W⊙M)ᵀ + b + X·Dᵀ·Uᵀ``, the pruned entries of W being zeros."""
    y = x @ values[f"{layer}.weight"].t() + values[f"{layer}.bias"]
    return y + (x @ values[f"{layer}.down"].t()) @ values[f"{layer}.up"].t() if adapted else y


def by_hand(values: dict[str, Tensor], update: Sgd | AdamW) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Twelve steps in float64; returns the values and the masks."""
    values = {name: value.detach().double().clone() for name, value in values.items()}
    masks = {layer: two_of_four(values[f"{layer}.weight"]) for layer in (0, 2)}
    for layer in (0, 2):
        values[f"{layer}.weight"] = values[f"{layer}.weight"] * masks[layer]
    for step in range(STEPS):
        adapted = step >= START
        if step % EVERY == 0:
            again = two_of_those(values["2.weight"], masks[2])
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).double()
        hidden = torch.tanh(forward(values, 0, x, adapted))
        out = forward(values, 2, hidden, adapted)
        d_out = 2 * (out - x.flip(1)) / out.numel()
        d_hidden = d_out @ (values["2.weight"] * again)
        if adapted:
            d_hidden = d_hidden + (d_out @ values["2.up"]) @ values["2.down"]
        gradients = {}
        for layer, seen, d_seen in ((0, x, d_hidden * (1 - hidden**2)), (2, hidden, d_out)):
            gradients[f"{layer}.weight"] = d_seen.t() @ seen * masks[layer]
            gradients[f"{layer}.bias"] = d_seen.sum(0)
            if adapted:
                gradients[f"{layer}.down"] = (d_seen @ values[f"{layer}.up"]).t() @ seen
                gradients[f"{layer}.up"] = d_seen.t() @ (seen @ values[f"{layer}.down"].t())
        for name, gradient in gradients.items():
            values[name] = update(name, values[name], gradient)
    return values, masks


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("backend", ["masked", "simulated"])
def test_slope_with_adapters_equals_a_computation_by_hand(
    monkeypatch: pytest.MonkeyPatch, backend: str, kind: str, merge: bool
) -> None:
    monkeypatch.setitem(BACKENDS, "simulated", SimulatedBackend())
    make_update, make_optimizer = UPDATES[kind]
    model = mlp()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model)
    method = {"preset": "slope", "refresh_every": EVERY, "adapter_start": START, "adapter_rank": RANK,
              "adapter_merge": merge}  # fmt: skip
    training = st.SparseTraining(model, optimizer, method, STEPS, backend=backend, verbose=False)
    for name, (down, up) in training.adapters().items():
        start[f"{name}.down"], start[f"{name}.up"] = down.detach().clone(), up.detach().clone()
        assert down.shape == (RANK, model[int(name)].in_features)
        assert down.any()
        assert not up.any()
    expected, masks = by_hand(start, make_update())
    for step in range(STEPS):
        assert (model[0].adapter is not None) == (step >= START)
        if step == START:  # nothing touched them before
            for name, (down, up) in training.adapters().items():
                assert torch.equal(down, start[f"{name}.down"])
                assert not up.any()
        train(model, optimizer, 1, start=step)

    def close(found: Tensor, name: str) -> None:
        torch.testing.assert_close(found.detach().double(), expected[name], rtol=1e-4, atol=3e-6, msg=name)

    for name, (down, up) in training.adapters().items():
        close(model[int(name)].weight, f"{name}.weight")
        close(model[int(name)].bias, f"{name}.bias")
        close(down, f"{name}.down")
        close(up, f"{name}.up")
        assert torch.equal(model[int(name)].mask, masks[int(name)])
        assert expected[f"{name}.up"].abs().max() > 1e-3
    x = torch.randn(4, 16)
    hidden = torch.tanh(forward(expected, 0, x.double(), True))
    out = forward(expected, 2, hidden, True)
    torch.testing.assert_close(model(x).detach().double(), out, rtol=1e-4, atol=1e-5)
    training.finish()
    for layer in (0, 2):
        merged = expected[f"{layer}.weight"] + (expected[f"{layer}.up"] @ expected[f"{layer}.down"] if merge else 0)
        torch.testing.assert_close(model[layer].weight.detach().double(), merged, rtol=1e-4, atol=1e-5)
        assert type(model[layer]) is nn.Linear
    if merge:
        torch.testing.assert_close(model(x).detach().double(), out, rtol=1e-4, atol=1e-5)
    assert sorted(training.adapters()) == ["0", "2"]


def test_adapters_are_trained_at_the_end_and_merged_or_kept() -> None:
    for merge in (True, False):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        method = {"preset": "slope", "adapter_rank": 3, "adapter_start": 5, "adapter_merge": merge}
        training = st.SparseTraining(model, optimizer, method, 10, verbose=False)
        train(model, optimizer, 5)
        assert not any(up.any() for _, up in training.adapters().values())
        train(model, optimizer, 5, start=5)
        assert all(up.any() for _, up in training.adapters().values())
        x = torch.randn(4, 16)
        expected = model(x)
        sparse = [layer.weight.detach().clone() for layer in (model[0], model[2])]
        training.finish()
        assert len(optimizer.param_groups[0]["params"]) == 4
        parts = list(training.adapters().values())
        for layer, weight, (down, up) in zip((model[0], model[2]), sparse, parts, strict=True):
            wanted = weight + up @ down if merge else weight
            torch.testing.assert_close(layer.weight, wanted)
        if merge:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        else:
            assert (model[0].weight == 0).float().mean() == 0.5


def test_adapters_that_start_at_once_do() -> None:
    model = mlp()
    optimizer = adamw(model)
    st.SparseTraining(model, optimizer, {"preset": "slope", "adapter_start": 0}, 6, verbose=False)
    assert model[0].adapter is not None
