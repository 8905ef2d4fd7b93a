"""Second moments that had not settled when the others froze: Adam goes on there, and no entry is thrown away."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.modifiers.frozen_moments import FrozenMoments

RATE = 1e-2


def frozen_run(
    gradients: list[Tensor], head: int, kind: Callable[..., torch.optim.Optimizer] = torch.optim.Adam, **options: Any
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Values after every step, from zero, of a parameter whose second moment freezes after ``head`` steps."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = kind([parameter], lr=RATE, **options)
    moments = FrozenMoments([optimizer])
    values = [parameter.detach().clone()]
    for step, gradient in enumerate(gradients):
        if step == head:
            moments.freeze()
        parameter.grad = gradient.clone()
        optimizer.step()
        values.append(parameter.detach().clone())
    return values, optimizer


def steepest(beta1: float, beta2: float, head: int) -> float:
    """Most learning rates that an entry may move in a step: Adam's bound, and the ten that a frozen moment allows."""
    adam = (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5
    return (adam + 10) / (1 - beta1 ** (head + 1))


def wild(seed: int, steps: int, entries: int) -> list[Tensor]:
    """Gradients over 16 orders of magnitude, with silence, bursts and changes of scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.empty(steps, entries).uniform_(-8, 8, generator=generator)
    steady = 10 ** torch.empty(entries).uniform_(-8, 8, generator=generator)
    held = torch.rand(entries, generator=generator) < 0.5
    loud = torch.rand(steps, entries, generator=generator) < torch.rand(entries, generator=generator)
    begins = torch.randint(0, steps, (entries,), generator=generator)
    signs = torch.randn(steps, entries, generator=generator)
    after = torch.arange(steps)[:, None] >= begins
    return list((torch.where(held, steady, scales) * signs * loud * after).unbind())


@pytest.mark.parametrize("head", [1, 4, 60])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.9)])
def test_no_update_is_larger_than_adams_bound_allows(betas: tuple[float, float], head: int) -> None:
    for seed in range(4):
        values, _ = frozen_run(wild(seed, head + 40, 400), head, betas=betas)
        moved = torch.stack([(new - old).abs() for old, new in itertools.pairwise(values)])
        assert moved.isfinite().all()
        assert moved.max() <= 1.01 * RATE * steepest(*betas, head)
        assert (moved > 0).any(0).float().mean() > 0.8


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"weight_decay": 0.0, "maximize": True}], ids=str)
def test_entries_without_a_gradient_in_the_head_are_adams(kind: type, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(8, 6, generator=generator) for _ in range(30)]
    late = torch.zeros(8, 6, dtype=torch.bool)
    late[5:] = True
    late[0, 3] = True
    for step, gradient in enumerate(gradients):
        gradient[late if step < 12 else late & (torch.rand(8, 6, generator=generator) < 0.5)] = 0
    found, optimizer = frozen_run(gradients, 12, kind, **options)
    plain, adam = frozen_run(gradients, len(gradients), kind, **options)  # frozen after the run
    torch.testing.assert_close(found[-1][late], plain[-1][late], rtol=1e-5, atol=1e-7)
    assert not torch.isclose(found[-1][~late], plain[-1][~late]).any()
    ours, theirs = (next(iter(entry.state.values()))["exp_avg_sq"] for entry in (optimizer, adam))
    torch.testing.assert_close(ours[late], theirs[late])


def test_a_moment_of_one_gradient_long_ago_is_not_trusted() -> None:
    gradients = [torch.zeros(1)] * 250
    gradients[0] = torch.ones(1)
    gradients[200:] = [torch.ones(1)] * 50
    found, _ = frozen_run(gradients, 200, betas=(0.9, 0.95))
    plain, _ = frozen_run(gradients, len(gradients), betas=(0.9, 0.95))
    for ours, theirs in zip(found[200:], plain[200:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)


def test_settled_entries_stand_still_whatever_their_neighbours_do() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, 50, generator=generator) for _ in range(150)]
    for gradient in gradients[:100]:
        gradient[0] = 0
    values, optimizer = frozen_run(gradients, 100, betas=(0.9, 0.99))
    first = second = torch.zeros(50, dtype=torch.float64)
    value = torch.zeros(50, dtype=torch.float64)
    for step, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient[1].double()
        if step <= 100:
            second = 0.99 * second + 0.01 * gradient[1].double() ** 2
        value = value - RATE * first / (1 - 0.9**step) / ((second / (1 - 0.99 ** min(step, 100))).sqrt() + 1e-8)
    torch.testing.assert_close(values[-1][1].double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        next(iter(optimizer.state.values()))["exp_avg_sq"][1].double(), second, rtol=1e-5, atol=0
    )


class Tied(nn.Module):
    """A language model whose embedding is its head, with units that are dead until step 8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(24, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, alive: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embedding(tokens))) * alive)


def steps_of(model: Tied, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Train; return the most that a weight moved in a step. The head sees tokens below 8 alone, in and out."""
    farthest = 0.0
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        known = 8 if step < 8 else 24
        tokens = torch.randint(0, known, (12,), generator=generator)
        alive = (torch.arange(16) < 8) | torch.tensor(step >= 8)
        optimizer.zero_grad()
        logits = model(tokens, alive.float())[:, :known]
        nn.functional.cross_entropy(logits, tokens.roll(1)).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        moved = [(old - new.detach()).abs().max() for old, new in zip(before, model.parameters(), strict=True)]
        farthest = max(farthest, float(torch.stack(moved).max()))
    return farthest


METHOD = {"preset": "step", "latest": 8, "earliest": 8}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_unused_rows_and_dead_units_of_a_tied_model_stay_sane(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = Tied()
    optimizer = kind(model.parameters(), lr=RATE)
    st.SparseTraining(model, optimizer, METHOD, 40, targets=["body"], verbose=False)
    assert steps_of(model, optimizer, range(40)) < RATE * steepest(0.9, 0.999, 8)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert max(float(parameter.detach().abs().max()) for parameter in model.parameters()) < 5


@pytest.mark.parametrize("stop", [7, 8, 9, 15])
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(stop: int) -> None:
    model, other = Tied(), Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    training = st.SparseTraining(model, optimizer, METHOD, 40, targets=["body"], verbose=False)
    steps_of(model, optimizer, range(stop))
    saved = pickle.loads(pickle.dumps([model.state_dict(), optimizer.state_dict(), training.state_dict()]))
    steps_of(model, optimizer, range(stop, 20))
    other.load_state_dict(saved[0])
    again = torch.optim.AdamW(other.parameters(), lr=RATE)
    again.load_state_dict(saved[1])
    resumed = st.SparseTraining(other, again, METHOD, 40, targets=["body"], state=saved[2], verbose=False)
    steps_of(other, again, range(stop, 20))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, again.state[theirs][key]), key
    ours, theirs = (entry.state_dict()["modifiers"]["frozen_moments"] for entry in (training, resumed))
    assert any(entry["going"] is not None for entry in ours[0])
    for mine, yours in zip(ours[0], theirs[0], strict=True):
        assert mine["correction"] == yours["correction"]
        assert (mine["going"] is None) == (yours["going"] is None)
        assert mine["going"] is None or torch.equal(mine["going"], yours["going"])


def test_damaged_states_are_refused_before_anything_is_changed() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    training = st.SparseTraining(model, optimizer, METHOD, 40, targets=["body"], verbose=False)
    steps_of(model, optimizer, range(12))
    state = training.state_dict()
    going = state["modifiers"]["frozen_moments"][0][0]["going"]
    assert going.dtype == torch.bool
    for damage in (
        1.0,
        {"correction": 0.0, "going": None},
        {"correction": float("nan"), "going": None},
        {"correction": "0.1", "going": None},
        {"correction": 0.1},
        {"correction": 0.1, "going": going.float()},
        {"correction": 0.1, "going": going[:2]},
    ):
        damaged = copy.deepcopy(state)
        damaged["modifiers"]["frozen_moments"][0][0] = damage
        with pytest.raises(ValueError, match=r"^state.*(frozen_moments|frozen moments of a parameter \(24, 16\))"):
            training.load_state_dict(damaged)
    for damage in ([], 3, [3], [[None]]):
        with pytest.raises(ValueError, match=r"^state.*frozen.moments"):
            training.load_state_dict({**state, "modifiers": {**state["modifiers"], "frozen_moments": damage}})
    assert training.state_dict()["modifiers"]["frozen_moments"][0][0]["going"].equal(going)
