import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import mlp
from oracles import brute_force_mask
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.criteria import (
    CRITERIA,
    Criterion,
    Fisher,
    Movement,
    Wanda,
    WeightGradient,
    resolve_criterion,
)
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.modifiers.criterion_observer import Observer
from sparsetrain.training.step_hooks import StepHooks

STATISTICS = {
    "weight_gradient": WeightGradient(beta=0.75),
    "movement": Movement(),
    "fisher": Fisher(beta=0.75),
    "wanda": Wanda(beta=0.75),
}
DECAY = 0.3


def observed(criterion: Criterion, **options: Any) -> tuple[nn.Sequential, Observer]:
    """A model of two masked layers under a fresh copy of the criterion."""
    model = mlp(bias=False, **options)
    layers = {name: to_sparse_(model[int(name)]) for name in ("0", "2")}
    for layer in layers.values():
        layer.set_codes_(st.encode_tiles(st.transposable_mask(layer.weight.detach().abs())))
    observer = Observer(copy.deepcopy(criterion), layers)
    observer.attach()
    return model, observer


def hang_on(observer: Observer, optimizers: list[torch.optim.Optimizer]) -> StepHooks:
    """What the engine does: observe, then add the masked decay, and count after a successful step."""

    def adjust(optimizer: torch.optim.Optimizer, scale: Tensor | None) -> None:
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = {name: layer for name, layer in observer.layers.items() if id(layer.weight) in owned}
        observer.note({name: layer.weight.grad for name, layer in layers.items()}, scale)
        for layer in layers.values():
            layer.weight.grad.add_(DECAY * (1 if scale is None else scale) * layer.weight.detach() * ~layer.mask)

    return StepHooks(optimizers, adjust, lambda optimizer: None, observer.count)


def batches(step: int, count: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(6, 16, generator=generator) for _ in range(count))


def loss_of(output: Tensor, x: Tensor) -> Tensor:
    return (output - x.flip(1)).square().mean()


def numpy_step(model: nn.Sequential, micro_batches: list[Tensor], clip: float | None) -> tuple[list, list]:
    """Straight-through gradients and squared norms of the inputs of both layers, from the equations, in float64."""
    layers = [model[0], model[2]]
    used = [(layer.weight.detach() * layer.mask).double().numpy() for layer in layers]
    gradients, norms = [0.0, 0.0], [0.0, 0.0]
    for batch in micro_batches:
        x = batch.double().numpy()
        hidden = np.tanh(x @ used[0].T)
        d_out = 2 * (hidden @ used[1].T - x[:, ::-1]) / x.size
        gradients[0] = gradients[0] + ((d_out @ used[1]) * (1 - hidden**2)).T @ x
        gradients[1] = gradients[1] + d_out.T @ hidden
        norms = [old + (value**2).sum(0) for old, value in zip(norms, (x, hidden), strict=True)]
    if clip is not None:
        total = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        gradients = [gradient * min(1.0, clip / (total + 1e-6)) for gradient in gradients]
    return gradients, norms


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


def wanda_run(forward: Any = None, wrap: Any = None, between: Any = None) -> dict[str, Tensor]:
    """Two micro-batches of one step; the statistics after it."""
    model, observer = observed(Wanda(beta=0.0))
    function = wrap(model) if wrap else model
    for x in batches(0):
        x.requires_grad_()
        loss_of(forward(function, x) if forward else function(x), x).backward()
        if between:
            between(model)
    observer.note({name: layer.weight.grad for name, layer in observer.layers.items()}, None)
    observer.count()
    return observer.criterion.state_dict()["running"]


def _segments(model: nn.Sequential, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(model[1:], checkpoint(model[0], x, use_reentrant=reentrant), use_reentrant=reentrant)


CHECKPOINTED = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "plain": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant segments": lambda model, x: _segments(model, x, True),
    "plain segments": lambda model, x: _segments(model, x, False),
    "nested": lambda model, x: checkpoint(_segments, model, x, False, use_reentrant=False),
}


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_recomputed_inputs_count_once(how: str) -> None:
    _, norms = numpy_step(observed(Wanda())[0], list(batches(0)), None)
    plain, found = wanda_run(), wanda_run(CHECKPOINTED[how])
    for layer, expected in zip(("0", "2"), norms, strict=True):
        assert torch.equal(found[layer], plain[layer])
        torch.testing.assert_close(found[layer].double(), torch.from_numpy(expected), rtol=1e-5, atol=0)


def test_forwards_without_a_backward_do_not_count() -> None:
    def between(model: nn.Module) -> None:
        model.eval()(torch.randn(4, 16))
        model.train()
        model(torch.randn(4, 16))  # no backward
        with torch.no_grad():
            model(torch.randn(4, 16))

    plain, found = wanda_run(), wanda_run(between=between)
    assert all(torch.equal(plain[layer], found[layer]) for layer in plain)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_compiled_models_count_the_same_in_one_graph(checkpointing: bool | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def compiled(model: nn.Module) -> Any:
        def forward(x: Tensor) -> Tensor:
            return model(x) if checkpointing is None else checkpoint(model, x, use_reentrant=checkpointing)

        return torch.compile(forward, backend=counter, fullgraph=not checkpointing)

    plain, found = wanda_run(), wanda_run(wrap=compiled)
    torch._dynamo.reset()
    for layer in plain:
        torch.testing.assert_close(found[layer], plain[layer], rtol=1e-6, atol=0)
    assert checkpointing or counter.frame_count == 1


def test_inputs_by_keyword_and_outputs_changed_in_place_are_no_trouble() -> None:
    plain = wanda_run()
    found = wanda_run(lambda model, x: model[2](input=model[1](model[0](input=x))))
    assert all(torch.equal(plain[layer], found[layer]) for layer in plain)
    model, observer = observed(Wanda(beta=0.0))
    model[1] = nn.ReLU(inplace=True)
    x = next(batches(0))
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        function(x).sum().backward()
        observer.note(dict.fromkeys(("0", "2"), torch.zeros(())), None)
        observer.count()
        hidden = model[0](x).detach().relu()
        torch.testing.assert_close(observer.criterion.state_dict()["running"]["2"], hidden.square().sum(0))
    torch._dynamo.reset()


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
        with pytest.raises(ValueError, match=r"fisher statistic of layer 'fc' is .* must be a torch.float32"):
            fisher.load_state_dict({**state, "running": {"fc": damage}})
        assert torch.equal(fisher.state_dict()["running"]["fc"], state["running"]["fc"])
    movement.load_state_dict(state)
    assert movement.state_dict()["running"] == {}


@pytest.mark.parametrize("name", CRITERIA)
def test_hooks_are_installed_where_inputs_are_needed_alone_and_removed(name: str) -> None:
    model, observer = observed(resolve_criterion(name))
    observer.attach()
    hooks = {name: (len(layer._forward_hooks), len(layer.weight._backward_hooks or ()))
             for name, layer in observer.layers.items()}  # fmt: skip
    assert hooks == dict.fromkeys(("0", "2"), (1, 1) if name == "wanda" else (0, 0))
    assert not any(module._forward_pre_hooks for module in model.modules())
    observer.detach()
    assert not any(layer._forward_hooks or layer.weight._backward_hooks for layer in observer.layers.values())
    before = observer.criterion.state_dict()
    model(torch.randn(4, 16)).sum().backward()
    assert not before.get("running")
    assert observer.criterion.state_dict() == before


def test_copies_of_a_model_are_not_observed() -> None:
    model, observer = observed(Wanda())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.randn(4, 16)).sum().backward()
        assert twin[0].weight.grad is not None
        assert all(hook.observer is None for hook in twin[0]._forward_hooks.values())
    observer.note(dict.fromkeys(("0", "2"), torch.zeros(())), None)
    observer.count()
    assert not any(value.any() for value in observer.criterion.state_dict()["running"].values())
    # and without inputs, the order is that of magnitudes
    torch.testing.assert_close(
        observer.criterion.scores(model[0].weight, layer="0", clock=1), model[0].weight.detach().abs()
    )


def test_inputs_of_frozen_weights_count() -> None:
    model, observer = observed(Wanda())
    observer.detach()
    model[2].weight.requires_grad_(False)
    observer = Observer(Wanda(beta=0.0), observer.layers)
    observer.attach()
    x = next(batches(0))
    model(x).sum().backward()
    observer.note({"0": model[0].weight.grad}, None)
    observer.count()
    hidden = model[:2](x).detach()
    torch.testing.assert_close(observer.criterion.state_dict()["running"]["2"], hidden.square().sum(0))


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


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, observer = observed(Wanda(beta=0.0))
    x = list(batches(0))[rank]
    model(x).sum().backward()
    observer.note({name: layer.weight.grad for name, layer in observer.layers.items()}, None)
    observer.count()
    torch.save(observer.criterion.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly exit


@pytest.mark.sweep
def test_data_parallel_ranks_share_their_inputs(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt")["running"] for rank in (0, 1))
    expected = torch.cat(list(batches(0))).square().sum(0)
    torch.testing.assert_close(first["0"], expected)
    assert all(torch.equal(first[layer], second[layer]) for layer in ("0", "2"))
