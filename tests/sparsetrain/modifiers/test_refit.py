"""The re-fit of kept weights in a run: when it happens, on which inputs, and that a run goes on with it exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.masks.least_squares import gram, refitted
from sparsetrain.modifiers.refit import STEPS, Refit
from sparsetrain.training.state_versions import STATE_VERSION

TOTAL, HEAD = 48, 40
METHOD = {"preset": "asp_one_shot", "prune_at": HEAD, "refit": True}
ITERATIVE = st.Schedule((st.Phase("dense", 4), st.Phase("frozen", 4, share=0.5), st.Phase("frozen")))


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))


MIXED = torch.randn(16, 16, generator=torch.Generator().manual_seed(9))


def batch_of(step: int) -> Tensor:
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(step)) @ MIXED


class Run:
    """A run whose steps can be taken one by one; ``seen`` has the inputs of the first layer."""

    def __init__(self, method: Any = METHOD, lr: float = 1e-3, model: nn.Module | None = None, **options: Any) -> None:
        self.model = model_of() if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.training = st.SparseTraining(self.model, self.optimizer, method, TOTAL, verbose=False, **options)
        self.forward: Callable[[Tensor], Tensor] = self.model

    def go_on(self, first: int, last: int, skipped: bool = False) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            x = batch_of(step)
            (self.forward(x) - x.flip(1)).square().mean().backward()
            if not skipped:
                self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.mark.parametrize(
    "method",
    [
        {"preset": "asp_one_shot", "prune_at": HEAD},
        {"preset": "asp_one_shot", "prune_at": HEAD, "frozen_in_place": False},
        {"preset": "recommended", "warmup": HEAD, "start": "pretrained"},
    ],
)
def test_outputs_are_closer_to_the_dense_ones_than_masks_alone_leave_them(method: dict[str, Any]) -> None:
    x, errors = batch_of(1000), []
    for refit in (False, True):
        run = Run({**method, "refit": refit}, lr=0.0)
        dense = run.model(x).detach()
        run.go_on(0, HEAD)
        assert run.training.phase != "dense"
        errors.append(float((run.model(x) - dense).detach().square().mean()))
    assert errors[1] < errors[0] / 2


def test_a_head_that_may_end_early_is_watched_from_before_that_on() -> None:
    earliest = STEPS + 2
    schedule = st.Schedule((st.Phase("dense", HEAD, earliest=earliest), st.Phase("frozen")))
    run = Run(st.Method(schedule=schedule, refit=True))
    layer = run.training.masks.layers["0"]
    run.go_on(0, earliest - STEPS - 1)
    assert not layer.refits_soon
    run.go_on(earliest - STEPS - 1, earliest - STEPS)
    assert layer.refits_soon


def test_the_inputs_of_the_last_steps_count_each_once() -> None:
    run = Run(lr=0.0)
    weight = run.model[0].weight.detach().clone()
    run.go_on(0, HEAD - 3)
    with torch.no_grad():
        run.model(batch_of(500))
    run.model(batch_of(501))  # no backward
    run.go_on(HEAD - 3, HEAD)
    layer = run.training.masks.layers["0"]
    inputs = torch.cat([batch_of(step) for step in range(HEAD - STEPS, HEAD)])
    wanted = refitted(weight, layer.mask, gram(inputs)) * layer.mask
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-3, atol=1e-4)


def test_micro_batches_and_recomputation_count_as_one_batch_does() -> None:
    plain, parted, recomputed = Run(lr=0.0), Run(lr=0.0), Run(lr=0.0)
    recomputed.forward = lambda x: checkpoint(recomputed.model, x, use_reentrant=False)
    for step in range(HEAD):
        for part in batch_of(step).chunk(3):
            parted.model(part).sum().backward()
        parted.optimizer.step()
    for run in (plain, recomputed):
        run.go_on(0, HEAD)
        for ours, theirs in zip(run.weights(), parted.weights(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_an_overflow_is_left_out() -> None:
    plain, run = Run(lr=0.0), Run(lr=0.0)
    plain.go_on(0, HEAD)
    run.go_on(0, HEAD - 1)
    run.model(torch.full((2, 16), torch.inf)).sum().backward()
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    inputs = torch.cat([batch_of(step) for step in range(HEAD - STEPS, HEAD - 1)])
    layer = run.training.masks.layers["0"]
    assert layer.weight.isfinite().all()
    wanted = refitted(model_of()[0].weight.detach(), layer.mask, gram(inputs)) * layer.mask
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop", [2, HEAD - STEPS, HEAD - 1, HEAD, HEAD + 1])
def test_a_resumed_run_is_the_uninterrupted_one(stop: int) -> None:
    whole = Run()
    whole.go_on(0, TOTAL)
    first = Run()
    first.go_on(0, stop)
    state = first.training.state_dict()
    assert bool(state["modifiers"].get("refit")) == (HEAD - STEPS <= stop < HEAD)
    model = model_of(seed=1)
    model.load_state_dict(first.model.state_dict())
    second = Run(model=model, state=state)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.go_on(stop, TOTAL)
    assert all(map(torch.equal, whole.weights(), second.weights()))


def test_a_layer_whose_rows_are_cut_now_keeps_what_masks_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run(lr=0.0)
    first.go_on(0, HEAD - 1)
    state = first.training.state_dict()
    monkeypatch.setattr(Refit, "_whole", lambda self: {name: self.layers[name] for name in ("2",)})
    with pytest.warns(UserWarning, match="^refit leaves layers '0' as masks leave them"):
        second = Run(lr=0.0, state=state)
    before = second.model[0].weight.detach().clone()
    second.go_on(HEAD - 1, HEAD)
    layer = second.training.masks.layers["0"]
    assert torch.equal(layer.weight, before * layer.mask)


def test_nothing_is_gathered_before_or_afterwards() -> None:
    run = Run()
    run.go_on(0, HEAD - STEPS - 1)
    layer = run.training.masks.layers["0"]
    assert not layer.refits_soon
    run.go_on(HEAD - STEPS - 1, HEAD - 1)
    assert layer.refits_soon
    run.go_on(HEAD - 1, TOTAL)
    assert not layer.refits_soon
    run.training.finish()
    assert not any(module._forward_hooks or hasattr(module, "refits_soon") for module in run.model.modules())


def test_a_compiled_model_is_fitted_alike() -> None:
    plain, compiled = Run(lr=0.0), Run(lr=0.0)
    compiled.forward = torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    for run in (plain, compiled):
        run.go_on(0, HEAD)
    torch._dynamo.reset()
    for ours, theirs in zip(plain.weights(), compiled.weights(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_are_fitted_in_the_round_that_prunes_them() -> None:
    run = Run(st.Method(schedule=ITERATIVE, refit=True), lr=0.0)
    before = run.weights()
    run.go_on(0, 4)
    (first,) = run.training._phases.run.active
    fitted = run.weights()
    run.go_on(4, 8)
    second = ({"0", "2"} - {first}).pop()
    for name, at_round in ((first, 4), (second, 8)):
        layer = run.training.masks.layers[name]
        index = 0 if name == "0" else 2
        kept = layer.mask
        assert not torch.allclose(run.weights()[index][kept], before[index][kept])
        assert torch.equal(fitted[index], before[index]) == (at_round == 8)


def test_one_by_one_convolutions_are_fitted_and_larger_ones_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, bias=False))
    before = [layer.weight.detach().clone() for layer in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = {"preset": "asp_one_shot", "prune_at": 2, "refit": True}
    st.SparseTraining(model, optimizer, method, 4, targets="all-conv", verbose=False)
    mixing = torch.randn(8, 8)
    for _ in range(2):
        model(torch.einsum("ij,bjhw->bihw", mixing, torch.randn(2, 8, 5, 5))).sum().backward()
        optimizer.step()
    for layer, old, moved in zip(model, before, (True, False), strict=True):
        assert torch.allclose(layer.weight[layer.mask], old[layer.mask]) != moved


def test_transposed_weights_are_fitted_as_others() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear = Conv1D(16, 16), nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    runs = [Run({**METHOD, "prune_at": 2}, lr=0.0, model=nn.Sequential(layer)) for layer in (conv, linear)]
    masked = linear.weight.detach().clone()
    for run in runs:
        run.go_on(0, 2)
    kept = linear.weight != 0
    assert not torch.allclose(linear.weight[kept], masked[kept])
    torch.testing.assert_close(conv.weight.T, linear.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({**METHOD, "prune_at": 0}, r"refit is True but masks come into force before the first step"),
        (lambda: st.Method(forward="soft", refit=True), r"refit is True but forward is 'soft'"),
    ],
)
def test_what_has_no_inputs_or_no_masked_weight_is_refused(method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(method() if callable(method) else method)


@pytest.mark.parametrize("version", [9, STATE_VERSION])
@pytest.mark.parametrize(
    "damage",
    [{"x": torch.zeros(1, 16, 16)}, {"0": torch.zeros(1, 8, 8)}, {"0": torch.zeros(5)}, {"0": 3}, [1]],
    ids=["another layer", "another shape", "no matrices", "a number", "no mapping"],
)
def test_a_damaged_state_is_refused(damage: Any, version: int) -> None:
    run = Run()
    run.go_on(0, HEAD - 1)
    state = run.training.state_dict()
    state["modifiers"]["refit"], state["version"] = damage, version
    with pytest.raises(ValueError, match=r"state\['modifiers'\]\['refit'\]"):
        Run(state=state)


def test_sums_of_the_version_before_go_on_with_the_damping_of_then() -> None:
    first = Run(lr=0.0)
    first.go_on(0, HEAD - 1)
    state = first.training.state_dict()
    grams = {name: value[:, :-1] for name, value in state["modifiers"]["refit"].items()}
    second = Run(lr=0.0, state={**state, "version": 9, "modifiers": {**state["modifiers"], "refit": grams}})
    weight = second.model[0].weight.detach().clone()
    second.go_on(HEAD - 1, HEAD)
    inputs = torch.cat([batch_of(step) for step in range(HEAD - STEPS, HEAD)])
    layer = second.training.masks.layers["0"]
    wanted = refitted(weight, layer.mask, gram(inputs), 0.01) * layer.mask
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-3, atol=1e-4)
