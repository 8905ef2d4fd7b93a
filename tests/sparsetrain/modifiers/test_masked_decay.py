"""The decay of pruned weights as a run goes on: following flip rates, or growing."""

import pytest
import torch
from models import mlp, train
from torch import nn

import sparsetrain as st


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
        assert after["decay"] == pytest.approx(expected)
        values.add(after["decay"])
    assert len(values) > 1


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
