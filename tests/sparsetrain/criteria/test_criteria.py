"""Criteria: their scores and statistics against independent computations, what is saved, and what is refused."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from observed_models import batches, loss_of, numpy_step, observed
from oracles import brute_force_mask
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain as st
from sparsetrain.criteria import CRITERIA, Fisher, Movement, Wanda, WeightGradient, resolve_criterion
from sparsetrain.modifiers.criterion_observer import Observer
from sparsetrain.training.step_hooks import StepHooks

STATISTICS = {
    "weight_gradient": WeightGradient(beta=0.75),
    "movement": Movement(),
    "fisher": Fisher(beta=0.75),
    "wanda": Wanda(beta=0.75),
}
DECAY = 0.3


def hang_on(observer: Observer, optimizers: list[torch.optim.Optimizer]) -> StepHooks:
    """What the engine does: observe, then add the masked decay, and count after a successful step."""

    def adjust(optimizer: torch.optim.Optimizer, scale: Tensor | None) -> None:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = {name: layer for name, layer in observer.layers.items() if id(layer.weight) in owned}
        observer.note({name: layer.weight.grad for name, layer in layers.items()}, scale)
        for layer in layers.values():
            layer.weight.grad.add_(DECAY * (1 if scale is None else scale) * layer.weight.detach() * ~layer.mask)

    return StepHooks(optimizers, adjust, lambda *_: None, lambda optimizer: None, observer.count)


def numpy_count(name: str, running: Any, w: np.ndarray, g: np.ndarray, squares: np.ndarray) -> Any:
    if name == "movement":
        return running - w * g
    new = {"weight_gradient": np.abs(w * g), "fisher": (w * g) ** 2, "wanda": squares}[name]
    return 0.75 * running + 0.25 * new


@pytest.mark.parametrize("caller", ["plain", "scaler", "fused scaler"])
@pytest.mark.parametrize("name", STATISTICS)
def test_scores_equal_an_independent_computation_with_a_skipped_step(name: str, caller: str) -> None:
    model, observer = observed(STATISTICS[name])
    scaling, fused = caller != "plain", caller == "fused scaler"
    clip = None if fused else 0.05
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaling)
    hang_on(observer, [optimizer])
    running: list[Any] = [0.0, 0.0]
    for step in range(5):
        micro_batches = list(batches(step))
        gradients, norms = numpy_step(model, micro_batches, clip)
        weights = [model[i].weight.detach().double().numpy().copy() for i in (0, 2)]
        optimizer.zero_grad()
        for x in micro_batches:
            scaler.scale(loss_of(model(x), x)).backward()
        skip = step in (0, 2)
        if skip and scaling:
            model[0].weight.grad[0, 0] = float("inf")
        if clip is not None and not (skip and scaling):
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaling or not skip:
            scaler.step(optimizer)
            scaler.update()
        if not skip:
            running = [numpy_count(name, *entry) for entry in zip(running, weights, gradients, norms, strict=True)]
    for layer, expected in zip(("0", "2"), running, strict=True):
        weight = observer.layers[layer].weight
        if name == "wanda":
            expected = np.abs(weight.detach().double().numpy()) * np.sqrt(expected)
        found = observer.criterion.scores(weight, layer=layer, clock=3)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-4, atol=2e-6 * np.abs(expected).max())


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STATISTICS)
def test_no_number_is_read_from_the_device(name: str) -> None:
    model, observer = observed(STATISTICS[name])
    with pytest.raises(AssertionError, match="_local_scalar_dense"), _NoReads():
        bool(torch.ones(()))
    for _ in range(2):
        with _NoReads():
            (x,) = batches(0, 1)
            loss_of(model(x), x).backward()
            observer.note({n: layer.weight.grad for n, layer in observer.layers.items()}, torch.tensor(2.0))
            observer.count()
            observer.criterion.scores(model[0].weight, layer="0", clock=1)


def test_a_step_skipped_with_zeroed_gradients_leaves_no_infinity_behind() -> None:
    model, observer = observed(Wanda(beta=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hang_on(observer, [optimizer])
    x = next(batches(0))
    for scale in (1.0, float("inf"), 1.0):
        optimizer.zero_grad(set_to_none=False)
        model(x * scale).sum().backward()
        if scale == 1.0:
            optimizer.step()
    assert observer.criterion.scores(model[0].weight, layer="0", clock=2).isfinite().all()


@pytest.mark.parametrize("name", STATISTICS)
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(name: str) -> None:
    def run(model: nn.Module, optimizers: list[torch.optim.Optimizer], halves: range) -> None:
        for half in halves:  # one step is both optimizers'
            (x,) = batches(half, 1)
            model.zero_grad()
            loss_of(model(x), x).backward()
            optimizers[half % 2].step()

    def fresh() -> tuple[nn.Sequential, Observer, list[torch.optim.Optimizer], StepHooks]:
        model, observer = observed(STATISTICS[name])
        optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]
        return model, observer, optimizers, hang_on(observer, optimizers)

    model, observer, optimizers, _ = fresh()
    run(model, optimizers, range(8))
    for stop in (0, 4, 5):
        first_model, first, first_optimizers, first_hooks = fresh()
        run(first_model, first_optimizers, range(stop))
        state = pickle.loads(pickle.dumps(first.criterion.state_dict()))
        assert bool(state["noted"]) == (stop == 5)
        saved = [value.clone() for value in state["running"].values()]
        second_model, second, second_optimizers, second_hooks = fresh()
        second_model.load_state_dict(first_model.state_dict())
        second.criterion.load_state_dict(state)
        second_hooks.stepped = set(first_hooks.stepped)
        run(second_model, second_optimizers, range(stop, 8))
        for part in ("running", "noted"):
            found, expected = second.criterion.state_dict()[part], observer.criterion.state_dict()[part]
            assert list(found) == list(expected)
            assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        assert all(torch.equal(a, b) for a, b in zip(saved, state["running"].values(), strict=True))
    assert set(observer.criterion.state_dict()["running"]) == {"0", "2"}


def test_states_of_other_criteria_leave_no_statistics_and_damaged_ones_are_refused() -> None:
    fisher, movement = Fisher(), Movement()
    for criterion in (fisher, movement):
        criterion.observe_gradient("fc", torch.ones(4, 4), torch.ones(4, 4), None)
        criterion.observe_step()
    state = fisher.state_dict()
    for damage in (state["running"]["fc"].double(), 3.0):
        with pytest.raises(
            ValueError, match=r"^state\['criterion'\]\['running'\]\['fc'\] is .* must be a torch.float32"
        ):
            fisher.check_state_dict({**state, "running": {"fc": damage}}, {"fc": (4, 4, 4)})
        assert torch.equal(fisher.state_dict()["running"]["fc"], state["running"]["fc"])
    movement.load_state_dict(state)
    assert movement.state_dict()["running"] == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_statistics_are_float32_whatever_the_weight(dtype: torch.dtype) -> None:
    weight, gradient = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    criterion = Movement()
    criterion.observe_gradient("fc", weight, gradient, torch.tensor(4.0))
    criterion.observe_step()
    found = criterion.state_dict()["running"]["fc"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), -weight.double() * gradient.double() / 4, rtol=1e-6, atol=0)
    big = torch.full((40, 4), 300.0).to(dtype)  # squares overflow float16
    assert Wanda().summarize_input(big).dtype == torch.float32
    torch.testing.assert_close(Wanda().summarize_input(big).double(), big.double().square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_all_negative_weights_keep_the_largest_magnitudes_before_there_are_statistics(name: str) -> None:
    weight = -torch.rand(8, 12) - 0.1
    scores = resolve_criterion(name).scores(weight, layer="fc", clock=0)
    expected = brute_force_mask(weight.abs().double().numpy())
    assert np.array_equal(st.transposable_mask(scores).numpy(), expected)


def test_all_negative_weights_keep_the_largest_inputs_and_movements() -> None:
    weight = -torch.rand(8, 8) - 0.1
    gradient, norms = torch.randn(8, 8), torch.rand(8) * 4
    for criterion, expected in (
        (Movement(), -weight * gradient),
        (WeightGradient(), (weight * gradient).abs()),
        (Fisher(), (weight * gradient) ** 2),
        (Wanda(), weight.abs() * norms),
    ):
        if "gradient" in criterion.needs:
            criterion.observe_gradient("fc", weight, gradient, None)
        else:
            criterion.observe_input("fc", norms.square())
        criterion.observe_step()
        mask = st.transposable_mask(criterion.scores(weight, layer="fc", clock=1))
        assert np.array_equal(mask.numpy(), brute_force_mask(expected.double().numpy())), criterion


def test_what_is_not_allowed_is_named() -> None:
    with pytest.raises(ValueError, match=r"criterion is 'size'.*fisher.*magnitude.*movement.*wanda.*weight_gradient"):
        resolve_criterion("size")
    for beta in (-0.1, 1.0, float("nan")):
        for kind in (WeightGradient, Fisher, Wanda):
            with pytest.raises(ValueError, match=r"beta is .* at least 0 and below 1"):
                kind(beta=beta)


def test_configurations_compare_and_copies_have_statistics_of_their_own() -> None:
    criterion = WeightGradient(beta=0.5)
    twin = copy.deepcopy(criterion)
    twin.observe_gradient("fc", torch.ones(4, 4), torch.ones(4, 4), None)
    twin.observe_step()
    assert twin == criterion == WeightGradient(beta=0.5) != WeightGradient()
    assert repr(twin) == "WeightGradient(beta=0.5)"
    assert criterion.state_dict()["running"] == {}
    assert st.Method(criterion=twin).describe()["criterion"] == "WeightGradient(beta=0.5)"
