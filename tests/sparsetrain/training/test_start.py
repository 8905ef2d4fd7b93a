"""A method that is another one for pretrained models: which one a run takes, and that it keeps it when it goes on."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.layers.selection.pretrained import is_pretrained
from sparsetrain.methods import recommended

TOTAL = 60


def model_of(gain: Tensor | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 8))
    if gain is not None:
        model[1].load_state_dict({"weight": gain})
    return model


TRAINED = torch.linspace(0.5, 1.5, 16)


def run_of(model: nn.Module, method: Any = "recommended", **options: Any) -> st.SparseTraining:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return st.SparseTraining(model, optimizer, method, TOTAL, verbose=False, **options)


def train(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(batch) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("gain", "criterion", "start"),
    [
        (None, "magnitude", "from scratch"),
        (torch.zeros(16), "magnitude", "from scratch"),  # as some models begin
        (TRAINED, "wanda", "pretrained, so criterion='wanda', refit=True, decay_in_head=False, decay_ramp=0"),
    ],
)
def test_a_run_sees_by_the_norms_whether_its_model_was_trained(gain: Tensor | None, criterion: str, start: str) -> None:
    training = run_of(model_of(gain))
    assert training.method.criterion == criterion
    assert training.report.summary().endswith(f" || start: {start}")
    assert training.method.if_pretrained == {}


@pytest.mark.parametrize("field", [{"decay_in_head": True}, {"decay_ramp": 0.1}, {"hysteresis": 0.1}], ids=str)
def test_what_is_given_holds_for_pretrained_models_too(field: dict[str, Any]) -> None:
    given, plain = (run_of(model_of(TRAINED), {"preset": "recommended", **own}).method for own in (field, {}))
    assert given == replace(plain, **field)


@pytest.mark.parametrize(
    ("arguments", "criterion"),
    [
        ({"start": "scratch"}, "magnitude"),
        ({"criterion": "magnitude", "refit": False}, "magnitude"),
        ({"warmup": 0.0}, "magnitude"),  # no head whose inputs could be seen
    ],
)
def test_what_is_given_is_not_looked_for(arguments: dict[str, Any], criterion: str) -> None:
    training = run_of(model_of(TRAINED), {"preset": "recommended", **arguments})
    assert training.method.criterion == criterion
    assert "start:" not in training.report.summary()


def test_a_start_that_is_given_needs_no_norms() -> None:
    training = run_of(nn.Sequential(nn.Linear(8, 8)), {"preset": "recommended", "start": "pretrained"})
    assert training.method.criterion == "wanda"
    assert not is_pretrained(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
def test_every_norm_with_gains_counts(norm: nn.Module) -> None:
    assert not is_pretrained(norm)
    assert norm.weight is not None
    norm.get_parameter("weight").data[2] = 0.9
    assert is_pretrained(norm)


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(4, elementwise_affine=False),
        nn.LayerNorm(1),
        nn.LayerNorm(4, device="meta"),
        nn.Linear(4, 4),
        nn.PReLU(4),
    ],
)
def test_what_has_no_gains_to_compare_says_nothing(module: nn.Module) -> None:
    if isinstance(module, nn.PReLU):
        module.weight.data[2] = 0.9
    assert not is_pretrained(module)


def from_state(model: nn.Module, state: dict[str, Any]) -> st.SparseTraining:
    return run_of(model, state=state)


def from_reader(model: nn.Module, state: dict[str, Any]) -> st.SparseTraining:
    seen: list[str | st.Criterion] = []

    def read(training: st.SparseTraining) -> dict[str, Any]:
        seen.append(training.method.criterion)
        return state

    training = run_of(model, state=read)
    assert seen[-1] == training.method.criterion  # it was last asked for what this method has room for
    return training


def from_load(model: nn.Module, state: dict[str, Any]) -> st.SparseTraining:
    training = run_of(model)
    training.load_state_dict(state)
    return training


def from_shards(model: nn.Module, state: dict[str, Any]) -> st.SparseTraining:
    return run_of(model, state=st.SparseTraining.sharded_state_dict(from_load(copy.deepcopy(model), state)))


@pytest.mark.filterwarnings("error:resuming")
@pytest.mark.parametrize("how", [from_state, from_reader, from_load, from_shards])
@pytest.mark.parametrize("stop", [5, 13, 40])  # before the first search that counts inputs, in the head, behind it
@pytest.mark.parametrize("gain", [None, TRAINED], ids=["scratch", "pretrained"])
def test_a_run_keeps_what_it_began_as(gain: Tensor | None, stop: int, how: Callable[..., st.SparseTraining]) -> None:
    model = model_of(gain)
    training = run_of(model)
    optimizer = training._phases.run.optimizers[0]
    train(model, optimizer, 0, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, stop, TOTAL)
    other = model_of(TRAINED)
    other.load_state_dict(saved[0])
    assert is_pretrained(other)  # whatever it was at the beginning
    resumed = how(other, saved[2])
    assert resumed.method == training.method
    assert resumed.report.summary() == training.report.summary()
    assert "wanda" in resumed.report.summary() if gain is not None else "scratch" in resumed.report.summary()
    other_optimizer = resumed._phases.run.optimizers[0]
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, stop, TOTAL)
    assert resumed.metrics() | {"refresh_ms": 0, "repack_ms": 0} == training.metrics() | {
        "refresh_ms": 0,
        "repack_ms": 0,
    }
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    resumed.finish()
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in other.modules()) == 0


def test_a_changed_method_is_not_followed() -> None:
    model = model_of()
    state = run_of(model, {"preset": "recommended", "decay": 0.25}).state_dict()
    with pytest.warns(UserWarning, match="resuming with another method"):
        training = run_of(model_of(), state=state)
    assert training.method == recommended(start="scratch")


@pytest.mark.filterwarnings("ignore:resuming with another method")
@pytest.mark.parametrize("change", [{"decay": 0.25}, {"lr_factor": 1.0}, {"warmup": 0.4}, {"dense_tail": 0.1}], ids=str)
@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_a_run_keeps_what_it_began_as_with_other_numbers_too(start: str, change: dict[str, Any]) -> None:
    saved = run_of(model_of(), {"preset": "recommended", "start": start, **change}).state_dict()
    for gain in (None, TRAINED):
        assert run_of(model_of(gain), state=saved).method == recommended(start=start)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:resuming with another method")
def test_behind_another_preset_the_norms_say_it() -> None:
    saved = run_of(model_of(), {"preset": "fst"}).state_dict()
    assert run_of(model_of(), state=saved).method == recommended(start="scratch")
    assert run_of(model_of(TRAINED), state=saved).method == recommended(start="pretrained")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pattern": "row_wise"}, "a key of if_pretrained is 'pattern': it must be one of"),
        ({"decay": -1}, "decay is -1: it must be"),
        ({"criterion": "magnitud"}, "criterion is 'magnitud'"),
        ({"criterion": st.criteria.Magnitude()}, r"if_pretrained\['criterion'\] is .*: it must be a string"),
        (3, "if_pretrained is 3: it must be a dict"),
    ],
)
def test_what_may_not_change_is_refused(changes: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}"):
        st.Method(if_pretrained=changes)


def test_a_start_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^start is 'pretraned': it must be one of .*did you mean 'pretrained'"):
        st.Method.chosen(st.methods.resolve_method({"preset": "recommended", "start": "pretraned"}), True)


def test_a_pretrained_model_that_is_compiled_trains_as_one_that_is_not() -> None:
    found = []
    for compiled in (False, True):
        model = model_of(TRAINED)
        training = run_of(model)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        train(run, training._phases.run.optimizers[0], 0, TOTAL)
        assert training.metrics()["sparse_layers"] == 2
        found.append([*training.state_dict()["codes"].values(), *model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
