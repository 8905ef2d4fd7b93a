"""Soft weights are seen times a factor, which phases and densities change."""

from typing import Any

import pytest
import torch
from models import convnet, mlp, train

import sparsetrain as st


@pytest.mark.parametrize("build", [mlp, convnet])
def test_freezing_soft_weights_changes_no_output(build: Any) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = {"preset": "s_ste", "schedule": [{"kind": "sparse", "length": 2}, {"kind": "frozen"}]}
    targets = "all-linear" if build is mlp else "all-conv"
    training = st.SparseTraining(model, optimizer, method, 6, targets, verbose=False)
    x = torch.randn(4, 16)
    expected = model(x)
    for step in range(5):
        torch.testing.assert_close(model(x), expected)
        train(model, optimizer, 1, start=step)
    assert training.phase == "frozen"
    training.finish()
    torch.testing.assert_close(model(x), expected)


def test_the_soft_scale_is_that_of_the_density() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = {"preset": "s_ste", "schedule": [{"kind": "sparse", "length": 2, "kept": 3}, {"kind": "sparse"}]}
    training = st.SparseTraining(model, optimizer, method, 6, verbose=False)
    scales = []
    for step in range(4):
        layer = training.masks.layers["0"]
        magnitude = layer.weight.detach().abs().double()
        fours = magnitude.view(-1, 4)
        threshold = fours.sort(dim=1).values[:, :1] if step < 2 else fours.sort(dim=1).values[:, 1:2]
        soft = (fours - threshold).clamp(min=0).view_as(magnitude)
        assert float(layer.soft_scale) == pytest.approx(float((magnitude * soft).sum() / soft.square().sum()), rel=1e-5)
        scales.append(float(layer.soft_scale))
        train(model, optimizer, 1, start=step)
    assert scales[0] == scales[1] != scales[2] == scales[3]
