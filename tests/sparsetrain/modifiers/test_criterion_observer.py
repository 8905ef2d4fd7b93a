"""What a criterion sees of a model's inputs: each once, however the model is run, and nothing once it is over."""

import copy
import pickle
from typing import Any

import pytest
import torch
from observed_models import batches, loss_of, numpy_step, observed
from ranks import ranks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sparsetrain.criteria import CRITERIA, Wanda, resolve_criterion
from sparsetrain.modifiers.criterion_observer import Observer


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
        assert all(hook.gatherer is None for hook in twin[0]._forward_hooks.values())
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


def test_data_parallel_ranks_share_their_inputs() -> None:
    first, second = ranks(2)("observed_models.statistics_of_a_rank")
    expected = torch.cat(list(batches(0))).square().sum(0)
    torch.testing.assert_close(first["0"], expected)
    assert all(torch.equal(first[layer], second[layer]) for layer in ("0", "2"))
