"""A loss times a factor, which Adam does not see: recommended does not see it either, bit for bit."""

from typing import Any

import pytest
import torch
from models import mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.optim import SparseAdamW

STEPS = 30
POWERS_OF_TWO = (2.0**-10, 2.0**10)  # others round


def weights_after(method: str | dict[str, Any], factor: float, kind: type[torch.optim.Optimizer]) -> list[Tensor]:
    model: nn.Module = mlp()
    options: Any = {"lr": 1e-2, "weight_decay": 0.1, "eps": 0.0}  # ε is a scale
    optimizer = kind(model.parameters(), **options)
    training = st.SparseTraining(model, optimizer, method, STEPS, verbose=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        (factor * (model(x) - x.flip(1)).square().mean()).backward()
        optimizer.step()
    training.finish()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, SparseAdamW])
@pytest.mark.parametrize("start", ["scratch", "pretrained"])
@pytest.mark.parametrize("factor", POWERS_OF_TWO)
def test_recommended_ends_with_the_same_weights(factor: float, start: str, kind: type[torch.optim.Optimizer]) -> None:
    method = {"preset": "recommended", "start": start, "refresh_every": 4}
    usual, scaled = weights_after(method, 1.0, kind), weights_after(method, factor, kind)
    assert all(torch.equal(a, b) for a, b in zip(usual, scaled, strict=True))


def test_a_decay_that_is_added_to_gradients_ends_with_others() -> None:
    usual, scaled = (weights_after("fst", factor, torch.optim.AdamW) for factor in (1.0, POWERS_OF_TWO[0]))
    assert not all(torch.equal(a, b) for a, b in zip(usual, scaled, strict=True))
