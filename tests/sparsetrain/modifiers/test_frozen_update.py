"""The update with frozen second moments by itself: complex parameters, and tensors in place of numbers."""

import pytest
import torch
from torch import nn

from sparsetrain.modifiers.adam_update import Frozen, update_
from sparsetrain.modifiers.frozen_moments import FrozenMoments


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    results = []
    for complex_valued in (True, False):
        torch.manual_seed(0)
        start, gradients = torch.randn(4, 2), torch.randn(6, 4, 2)
        parameter = nn.Parameter(torch.view_as_complex(start.clone()) if complex_valued else start.clone())
        optimizer = torch.optim.Adam([parameter], lr=0.1, weight_decay=0.1)
        moments = FrozenMoments([optimizer])
        for step, gradient in enumerate(gradients):
            if step == 3:
                moments.freeze()
            parameter.grad = torch.view_as_complex(gradient) if complex_valued else gradient
            optimizer.step()
        results.append(torch.view_as_real(parameter.detach()) if complex_valued else parameter.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_capturable_update_is_the_same_one(decoupled: bool) -> None:
    results = []
    for capturable in (False, True):
        torch.manual_seed(0)
        weights = [torch.randn(4, 4), torch.randn(3)]
        states = [
            {"step": torch.tensor(7.0 + i), "exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w)}
            for i, w in enumerate(weights)
        ]
        options = {"lr": torch.tensor([0.1]) if capturable else 0.1, "betas": (0.9, 0.99), "eps": 1e-3,
                   "weight_decay": 0.2, "maximize": True, "capturable": capturable,
                   "decoupled_weight_decay": decoupled}  # fmt: skip
        states[0]["exp_avg_sq"][:2] *= 1e-6  # where Adam will go on
        frozen = [Frozen(0.3, torch.zeros(4, 4, dtype=torch.bool)), Frozen(0.4, torch.zeros(3, dtype=torch.bool))]
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            update_(weights, states, frozen, options)
        assert [state["step"].item() for state in states] == [10.0, 11.0]
        assert frozen[0].going.any()
        assert not frozen[0].going.all()
        results.append([*weights, *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
