import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from sparsetrain import SparseTraining
from sparsetrain.methods import recommended
from sparsetrain.recipes.gpt import GPT, GPTModule
from sparsetrain.recipes.muon import MuonWithAdamW, muon_with_adamw

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "context": 16}


def small_model() -> GPT:
    torch.manual_seed(0)
    return GPT(**SIZES)


def loss_of(model: GPT, step: int) -> Tensor:
    tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: GPT, optimizers: list[torch.optim.Optimizer], steps: range) -> list[Tensor]:
    for step in steps:
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_it_is_both_optimizers() -> None:
    one, two = small_model(), small_model()
    hidden = [p for name, p in two.named_parameters() if name.startswith("blocks") and p.dim() == 2]
    rest = [p for p in two.parameters() if all(p is not other for other in hidden)]
    groups = [
        {"params": [p for p in rest if p.dim() == 2]},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    apart: list[torch.optim.Optimizer] = [
        Muon(hidden, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(groups, lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95)),
    ]
    ours = train(one, [muon_with_adamw(one, 2e-3, 0.1)], range(3))
    theirs = train(two, apart, range(3))
    assert all(map(torch.equal, ours, theirs))


def test_a_learning_rate_that_is_set_reaches_both() -> None:
    model = small_model()
    optimizer = muon_with_adamw(model, 2e-3, 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert all(map(torch.equal, before, train(model, [optimizer], range(1))))


def test_it_goes_on_from_its_state() -> None:
    whole, halves = small_model(), small_model()
    expected = train(whole, [muon_with_adamw(whole, 2e-3, 0.1)], range(4))
    first = muon_with_adamw(halves, 2e-3, 0.1)
    train(halves, [first], range(2))
    second = muon_with_adamw(halves, 9.0, 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(map(torch.equal, expected, train(halves, [second], range(2, 4))))


def test_matrices_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2D"):
        MuonWithAdamW([nn.Parameter(torch.zeros(4))], [])


def test_sparse_training_follows_it() -> None:
    model = small_model()
    optimizer = muon_with_adamw(model, 2e-3, 0.1)
    training = SparseTraining(model, optimizer, recommended(), total_steps=20, targets="mlp")
    train(model, [optimizer], range(20))
    assert training.metrics()["violations"] == 0
    training.finish()
    assert float((model.get_parameter("blocks.0.mlp.up.weight") == 0).float().mean()) >= 0.5


def test_the_module_knows_two_optimizers() -> None:
    with pytest.raises(ValueError, match="optimizer is 'sgd': it must be 'adamw' or 'muon'"):
        GPTModule(**SIZES, optimizer="sgd")  # type: ignore[arg-type]
