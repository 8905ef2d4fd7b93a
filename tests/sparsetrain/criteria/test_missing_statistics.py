"""Criteria that observe: what counts in evaluation mode, and searches without statistics, which are never silent."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from models import mlp
from oracles import brute_force_mask
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.criteria import StatisticCriterion, Wanda
from sparsetrain.methods import PRESETS

STATISTICS = ("wanda", "weight_gradient", "fisher", "movement")
PRUNE_AT = 4


@dataclass(frozen=True)
class LargestGradient(StatisticCriterion):
    """A user's own: the largest gradient so far."""

    name: ClassVar[str] = "largest_gradient"
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        self._noted[layer] = gradient.detach().abs().float()

    def count_(self, running: Tensor, noted: Tensor) -> None:
        torch.maximum(running, noted, out=running)


def skewed(step: int) -> Tensor:
    """Inputs of very different features, so that no criterion orders weights as magnitudes do."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step)) * torch.logspace(-2, 2, 16)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, forward: Callable[..., Tensor] | None = None
) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = skewed(step)
        (forward(model, x) if forward else model(x)).square().mean().backward()
        optimizer.step()


def one_shot(criterion: Any) -> dict[str, Any]:
    return {"preset": "asp_one_shot", "prune_at": PRUNE_AT, "criterion": criterion}


@contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


# what counts


@pytest.mark.parametrize("criterion", [*STATISTICS, LargestGradient()], ids=str)
def test_a_model_in_evaluation_mode_is_pruned_as_in_training_mode(criterion: Any) -> None:
    masks = []
    for mode in (True, False):
        model = mlp().train(mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        training = st.SparseTraining(model, optimizer, one_shot(criterion), 8, verbose=False)
        before = [model[place].weight.detach().clone() for place in (0, 2)]
        train(model, optimizer, range(PRUNE_AT))
        masks.append([layer.mask.clone() for layer in training.masks.layers.values()])
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))
    magnitude = brute_force_mask(before[0].abs().double().numpy())
    assert (masks[1][0].numpy() != magnitude).any()


def test_wanda_in_evaluation_mode_equals_its_definition() -> None:
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = st.SparseTraining(model, optimizer, one_shot("wanda"), 8, verbose=False)
    weight = model[0].weight.detach().double().clone()
    train(model, optimizer, range(PRUNE_AT))
    squares = torch.zeros(16, dtype=torch.float64)
    for step in range(PRUNE_AT):
        squares = 0.9 * squares + 0.1 * skewed(step).double().square().sum(0)
    expected = brute_force_mask((weight.abs() * squares.sqrt()).numpy())
    assert torch.equal(training.masks.layers["0"].mask, torch.from_numpy(expected))


def _checkpointed(reentrant: bool) -> Callable[..., Tensor]:
    return lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)


def _evaluated_beside(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        model(100 * torch.randn(4, 16))
    with torch.inference_mode():
        model(100 * torch.randn(4, 16))
    model(100 * torch.randn(4, 16))  # no backward
    return model(x)


@pytest.mark.parametrize(
    "forward",
    [_checkpointed(True), _checkpointed(False), _evaluated_beside],
    ids=["reentrant", "checkpointed", "evaluated beside"],
)
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_each_input_counts_once_in_either_mode(mode: bool, forward: Callable[..., Tensor]) -> None:
    found = []
    for how in (None, forward):
        model = mlp().train(mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        training = st.SparseTraining(model, optimizer, one_shot("wanda"), 8, verbose=False)
        train(model, optimizer, range(3), how)
        found.append(training.state_dict()["criterion"]["running"])
    for layer in ("0", "2"):
        assert found[0][layer].any()
        assert torch.equal(found[0][layer], found[1][layer])


@pytest.mark.filterwarnings("ignore:weights of sparse layers have requires_grad=False")
def test_frozen_weights_in_evaluation_mode_count() -> None:
    model = mlp().eval()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight], lr=0.0)
    with recorded():
        training = st.SparseTraining(model, optimizer, one_shot(Wanda(beta=0.0)), 8, verbose=False)
    train(model, optimizer, range(1))
    hidden = torch.tanh(model[0](skewed(0))).detach()
    torch.testing.assert_close(training.masks.criterion.state_dict()["running"]["2"], hidden.square().sum(0))


# searches without statistics


@pytest.mark.parametrize("criterion", [*STATISTICS, LargestGradient()], ids=str)
@pytest.mark.parametrize(
    "method",
    [
        {"preset": "asp_one_shot", "prune_at": 0},
        {"preset": "asp_one_shot", "prune_at": 0.0},
        {"preset": "fst"},
        {"preset": "sr_ste"},
        {"preset": "slope"},
        {"preset": "dense_to_sparse_finetune"},
        {"preset": "iterative", "start": 0},
    ],
    ids=str,
)
def test_masks_before_the_first_step_are_refused(method: dict[str, Any], criterion: Any) -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"^criterion is '\w+' but masks are searched before the first step, .* head of"
    ) as refusal:
        st.SparseTraining(
            model, torch.optim.AdamW(model.parameters()), {**method, "criterion": criterion}, 40, verbose=False
        )
    assert type(model[0]) is nn.Linear
    advised = {name for name in ("warmup", "prune_at", "start") if f"({name})" in str(refusal.value)}
    assert advised == {"warmup", "prune_at", "start"} & inspect.signature(PRESETS[method["preset"]]).parameters.keys()


@pytest.mark.parametrize("criterion", [*STATISTICS, LargestGradient()], ids=str)
def test_sparsify_has_no_statistics(criterion: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"^criterion is '\w+' but it has no statistics of layer '0', and sparsify_ "):
        st.sparsify_(model, criterion=criterion, verbose=False)
    assert type(model[0]) is nn.Linear
    st.sparsify_(model, criterion=criterion, phase="dense", verbose=False)  # searches none


def test_statistics_that_are_there_are_used() -> None:
    norms = {"0": torch.logspace(-2, 2, 16), "2": torch.logspace(2, -2, 32)}
    wanda = Wanda(beta=0.0)
    for layer, norm in norms.items():
        wanda.observe_input(layer, norm.square())
    wanda.observe_step()
    model = mlp()
    expected = [
        brute_force_mask((model[int(layer)].weight.detach().abs() * norm).double().numpy())
        for layer, norm in norms.items()
    ]
    st.sparsify_(model, criterion=wanda, verbose=False)
    assert all((model[place].mask.numpy() == mask).all() for place, mask in zip((0, 2), expected, strict=True))
    model = mlp()
    method = {"preset": "asp_one_shot", "prune_at": 0, "criterion": wanda}
    st.SparseTraining(model, torch.optim.AdamW(model.parameters()), method, 8, verbose=False)
    assert all((model[place].mask.numpy() == mask).all() for place, mask in zip((0, 2), expected, strict=True))


class WithSpare(nn.Module):
    """Two layers, of which one is not used before a step."""

    def __init__(self, used_from: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)
        self.used_from, self.step = used_from, 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.body(x) + (self.spare(x) if self.step > self.used_from else 0)


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("criterion", [*STATISTICS, LargestGradient()], ids=str)
def test_a_layer_without_statistics_is_named_once_and_ranked_by_magnitude(criterion: Any, to_none: bool) -> None:
    model = WithSpare(used_from=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = {"preset": "fst", "warmup": 3, "dense_tail": 0, "refresh_every": 2, "criterion": criterion, "decay": 0.0}
    training = st.SparseTraining(model, optimizer, method, 20, verbose=False)
    magnitude = brute_force_mask(model.spare.weight.detach().abs().double().numpy())
    found = []
    for step in range(16):
        optimizer.zero_grad(set_to_none=False)
        if step == 0 and not to_none:
            model.spare.weight.grad = torch.zeros_like(model.spare.weight)
        with recorded() as caught:
            model(skewed(step)).square().mean().backward()
            optimizer.step()
        found += [(training.clock, str(entry.message)) for entry in caught]
        if training.clock == 5:
            assert (training.masks.layers["spare"].mask.numpy() == magnitude).all()
    assert [clock for clock, _ in found] == [3]
    assert "has no statistics of 1 of 2 layers ('spare') at step 3, so magnitudes rank their weights: " in found[0][1]
    assert (training.masks.layers["spare"].mask.numpy() != magnitude).any()


def test_a_short_run_whose_head_rounds_to_nothing_says_so() -> None:
    model = mlp()
    method = {"preset": "asp_one_shot", "criterion": "wanda"}
    with pytest.warns(
        UserWarning, match=r"^criterion 'wanda' has no statistics of 2 of 2 layers \('0', '2'\) at step 0"
    ):
        st.SparseTraining(model, torch.optim.AdamW(model.parameters()), method, 1, verbose=False)


def test_dense_phases_wait_for_statistics() -> None:
    """Watched masks of magnitudes would flip as soon as there are statistics."""
    flips = {}
    for criterion in ("magnitude", "wanda"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = {"preset": "fst", "warmup": 8, "refresh_every": 2, "criterion": criterion}
        training = st.SparseTraining(model, optimizer, method, 20, verbose=False)
        assert ("kept_fraction" in training.metrics()) == (criterion == "magnitude")
        flips[criterion] = []
        for step in range(7):
            optimizer.zero_grad()
            model(skewed(0)).square().mean().backward()  # the same inputs, so that no mask has a reason to flip
            optimizer.step()
            flips[criterion].append(training.metrics().get("virtual_flip_rate"))
            assert training.refreshed == (step % 2 == 1)
    assert flips["magnitude"] == [None, 0, 0, 0, 0, 0, 0]
    assert flips["wanda"] == [None, None, None, 0, 0, 0, 0]


def test_an_automatic_decay_waits_for_statistics_too() -> None:
    method = {"preset": "fst", "decay": "auto", "refresh_every": 4, "warmup": 11, "criterion": "wanda"}
    model = mlp()
    with pytest.raises(ValueError, match=r"no dense phase of 3 refreshes .* at least 12 steps"):
        st.SparseTraining(model, torch.optim.AdamW(model.parameters()), method, 40, verbose=False)
    training = st.SparseTraining(
        model, (optimizer := torch.optim.SGD(model.parameters(), lr=0.3)), {**method, "warmup": 12}, 40, verbose=False
    )
    first = training.metrics()["decay"]
    train(model, optimizer, range(30))
    assert training.metrics()["decay"] != first


@pytest.mark.parametrize("criterion", STATISTICS)
def test_a_skipped_step_leaves_no_statistics(criterion: str) -> None:
    """A scaler that skips every step until the masks are due: the clock waits as well, so statistics are there."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    method = {"preset": "asp_one_shot", "prune_at": 1, "criterion": criterion}
    training = st.SparseTraining(model, optimizer, method, 8, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(model(skewed(step)).square().mean()).backward()
        if step < 2:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert training.clock == max(0, step - 1)
    assert training.phase == "frozen"
    assert training.masks.criterion.missing(["0", "2"]) == []


def test_statistics_are_there_after_resuming() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    training = st.SparseTraining(model, optimizer, one_shot("wanda"), 8, verbose=False)
    train(model, optimizer, range(PRUNE_AT - 1))
    state = training.state_dict()
    training.finish()
    magnitude = brute_force_mask(model[0].weight.detach().abs().double().numpy())
    resumed = st.SparseTraining(model, optimizer, one_shot("wanda"), 8, state=state, verbose=False)
    optimizer.step()
    assert (resumed.phase, resumed.masks.criterion.missing(["0", "2"])) == ("frozen", [])
    assert (resumed.masks.layers["0"].mask.numpy() != magnitude).any()
