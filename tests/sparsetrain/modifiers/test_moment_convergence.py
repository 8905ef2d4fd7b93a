"""STEP's dense head, which ends when second moments have settled."""

import pytest
import torch
from models import mlp, sgd
from torch import nn

import sparsetrain as st


def test_step_ends_its_dense_head_when_second_moments_have_settled() -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.8), eps=4e-6)
    training = st.SparseTraining(
        model, optimizer, {"preset": "step", "latest": 0.9, "earliest": 20}, 400, verbose=False
    )
    moments, changes, phases = dict.fromkeys(training.masks.layers, 0.0), [], []
    for at in range(400):
        phases.append(training.phase)
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(at)) * 0.97**at  # gradients fade
        (model(x) - x.flip(1)).square().mean().backward()
        total, entries = 0.0, 0
        for name, layer in training.masks.layers.items():
            after = 0.8 * moments[name] + 0.2 * layer.weight.grad.double() ** 2
            total += float((after - moments[name]).abs().sum())
            entries += after.numel()
            moments[name] = after
        changes.append(total / entries)
        optimizer.step()
    expected = next(
        at for at in range(20, 360, 10) if sum(changes[max(0, at - 5) : at]) / min(at, 5) < 4e-6
    )  # fmt: skip
    assert 20 < expected < 350
    assert phases == ["dense"] * expected + ["sparse"] * (400 - expected)


def test_step_needs_an_optimizer_with_second_moments() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"^optimizer is SGD but the dense head ends .* without 'earliest'\.$"):
        st.SparseTraining(model, sgd(model), "step", 40, verbose=False)
    assert type(model[0]) is nn.Linear
