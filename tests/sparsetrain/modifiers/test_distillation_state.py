"""What a run with a teacher saves, refuses and leaves behind."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilled_runs import METHOD, Noisy, batch, run, same, start, teacher_of
from models import mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.methods import dense_to_sparse_finetune, fst
from sparsetrain.modifiers.distillation import Distillation

# resuming


@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize(
    ("method", "teacher"),
    [(METHOD, None), (METHOD, lambda: mlp(seed=7)),
     (st.Method(distillation=0.5, schedule=st.from_scratch(4, 2), refresh_every=2), None)],
    ids=["own", "given", "dense head"],
)  # fmt: skip
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(method: Any, teacher: Any, stop: int) -> None:
    options = {"teacher": teacher()} if teacher else {}
    model = mlp()
    optimizer, training = start(model, method, **options)
    run(model, optimizer, training, 0, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    before = training.metrics().get("distillation")
    run(model, optimizer, training, stop)
    other = mlp(seed=1)
    other_optimizer, resumed = start(other, method, state=saved[2], **options)
    assert resumed.metrics().get("distillation") == before
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(copy.deepcopy(saved[1]))
    run(other, other_optimizer, resumed, stop)
    assert same(model, other)
    assert training.metrics().get("distillation") == resumed.metrics().get("distillation")
    training.load_state_dict(saved[2])  # in place
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(model, optimizer, training, stop)
    assert same(model, other)


def part(state: dict[str, Any]) -> Any:
    return state["modifiers"]["distillation"]


def damaged(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    model = mlp()
    _, training = start(model)
    state = training.state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("modifiers"), r"^state has no 'modifiers': .*\.$"),
        (
            lambda state: state["modifiers"].pop("distillation"),
            r"^state has no teacher but .* is 0\.67: pass one .*\.$",
        ),
        (lambda state: state["modifiers"].update(distillation=3), r"^state\[.*\['distillation'\] is 3: .* damaged\.$"),
        (lambda state: part(state).update(teacher=None), r"^state has no teacher but .*\.$"),
        (lambda state: part(state).update(given=True), r"^state is of a run with a teacher .* as teacher\.$"),
        (lambda state: part(state)["teacher"].pop("2.bias"), r"^state has a teacher whose '2\.bias' .*\.$"),
        (lambda state: part(state)["teacher"].update(more=torch.ones(1)), r"^state .* whose 'more' .*\.$"),
        (
            lambda state: part(state)["teacher"].update({"0.weight": torch.ones(4, 4)}),
            r"^state has a teacher whose '0\.weight' differs from that of the model: .*\.$",
        ),
    ],
)
def test_a_state_without_its_teacher_changes_nothing(change: Callable[..., Any], message: str) -> None:
    state = damaged(change)
    model = mlp(seed=1)
    optimizer, training = start(model)
    run(model, optimizer, training, 0, 3)
    before = copy.deepcopy((training.state_dict(), model.state_dict()))
    with pytest.raises(ValueError, match=message):
        training.load_state_dict(state)
    after = training.state_dict()
    assert after["clock"] == before[0]["clock"] == 3
    assert all(torch.equal(after["codes"][name], codes) for name, codes in before[0]["codes"].items())
    teachers = [entry["modifiers"]["distillation"]["teacher"] for entry in (after, before[0])]
    assert all(torch.equal(teachers[0][name], teachers[1][name]) for name in teachers[1])
    fresh = mlp(seed=1)
    with pytest.raises(ValueError, match=message):
        start(fresh, state=state)
    assert not fresh._forward_hooks
    assert type(fresh[0]) is nn.Linear


def test_a_state_of_a_run_without_distillation_goes_on_with_a_teacher_that_is_given() -> None:
    model = mlp()
    optimizer, training = start(model, dense_to_sparse_finetune(refresh_every=2))
    run(model, optimizer, training, 0, 4)
    with pytest.warns(UserWarning, match="resuming with another method"):
        _, resumed = start(model_of(model), METHOD, state=training.state_dict(), teacher=mlp())
    assert resumed.clock == 4


def model_of(model: nn.Module) -> nn.Module:
    other = mlp(seed=1)
    other.load_state_dict(model.state_dict())
    return other


# what is refused


def test_a_step_on_a_loss_that_was_not_distilled_is_an_error_before_it() -> None:
    model = mlp()
    optimizer, training = start(model)
    run(model, optimizer, training, 0, 1)
    before = copy.deepcopy(model.state_dict())
    x, y = batch(1)
    optimizer.zero_grad()
    optimizer.step()  # trains nothing
    F.cross_entropy(model(x), y).backward()
    message = r"^the method's distillation is 0\.67 but distilled\(\) was not called since the last step: .*\.$"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert training.clock == 2


def test_a_module_that_gives_no_logits_is_named() -> None:
    model = nn.ModuleDict({"net": mlp(), "other": nn.Linear(16, 16)})
    _, training = start(model)
    x, y = batch(0)
    with pytest.raises(RuntimeError, match=r"^no forward of the model in training mode .* in logits_from\.$"):
        training.distilled(F.cross_entropy(model["net"](x), y))
    _, training = start(nn.ModuleDict({"net": mlp(), "other": nn.Linear(16, 16)}), logits_from="net.2")
    with pytest.raises(RuntimeError, match=r"^no forward of 'net\.2' in training mode"):
        training.distilled(x.sum().requires_grad_())
    pair = Noisy(lambda logits: (logits, None))
    _, training = start(pair)
    with pytest.raises(RuntimeError, match=r"^the output of the model is of type tuple: .* in logits_from\.$"):
        training.distilled(pair(x)[0].sum())
    student = mlp()
    _, training = start(student, teacher=nn.Linear(16, 8))
    with pytest.raises(RuntimeError, match=r"^the teacher gives logits \(8, 8\) where the student gives \(8, 16\): "):
        training.distilled(student(x).sum())


def borrowed() -> nn.Module:
    model = mlp()
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (mlp, {"logits_from": "3"}, r"^logits_from is '3' but the model has no such submodule: .* such as '0', .*\.$"),
        (mlp, {"method": "fst", "teacher": nn.Linear(16, 16)}, r"^teacher is given but .* distillation is 0: .*\.$"),
        (borrowed, {}, r"^module '1' has a function in place of its forward, .* as teacher\.$"),
    ],
)
def test_what_cannot_be_distilled_is_refused_first(model: Any, options: dict[str, Any], message: str) -> None:
    student = model()
    with pytest.raises(ValueError, match=message):
        start(student, **options)
    assert type(student[0]) is nn.Linear


def test_a_teacher_that_is_trained_is_refused() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"^teacher shares '0\.weight' with the model: .* deep copy\.$"):
        start(model, teacher=nn.Sequential(model[0]))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("field", "value"), [("distillation", -0.1), ("distillation", 1.1), ("distillation", float("nan")),
                         ("distillation_temperature", 0), ("distillation_temperature", float("inf"))],
)  # fmt: skip
def test_shares_and_temperatures_have_bounds(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {value!r}: it must be a .*number .*\.$"):
        st.Method(**{field: value})


def test_the_preset_passes_its_arguments_on() -> None:
    method = dense_to_sparse_finetune(distillation=0.67, temperature=3.0)
    assert (method.distillation, method.distillation_temperature) == (0.67, 3.0)
    assert (dense_to_sparse_finetune().distillation, fst().distillation) == (0.0, 0.0)
    assert dense_to_sparse_finetune().distillation_temperature == 2.0


# nothing is left behind


def test_without_distillation_nothing_hangs_on_the_model() -> None:
    model = mlp()
    _, training = start(model, "fst")
    loss = model(torch.ones(2, 16)).sum()
    assert training.distilled(loss) is loss
    assert not model._forward_hooks
    assert "distillation" not in training.state_dict()["modifiers"]
    assert "distillation" not in training.metrics()


def test_finishing_takes_hook_and_teacher_away() -> None:
    model = mlp()
    optimizer, training = start(model)
    run(model, optimizer, training)
    teacher = weakref.ref(teacher_of(training))
    term = training.metrics()["distillation"]
    training.finish()
    gc.collect()
    assert teacher() is None
    assert not model._forward_hooks
    loss = model(torch.ones(2, 16)).sum()
    assert training.distilled(loss) is loss
    assert training.metrics()["distillation"] == term
    assert set(training.state_dict()["modifiers"]["distillation"]["teacher"]) == set(model.state_dict())


def test_inputs_are_let_go() -> None:
    model = mlp()
    optimizer, training = start(model)
    x, y = batch(0)
    held = weakref.ref(x)
    loss = training.distilled(F.cross_entropy(model(x), y))
    loss.backward()
    del x, loss
    optimizer.step()
    assert held() is None


def test_copies_of_the_model_do_not_teach_or_learn() -> None:
    model = mlp()
    optimizer, training = start(model)
    run(model, optimizer, training, 0, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        logits = model(torch.ones(2, 16))
        other(torch.zeros(5, 16))
        assert [hook.distillation for hook in other._forward_hooks.values()] == [None]  # no second teacher
        assert training.distilled(logits.sum()).isfinite()


def test_a_module_around_the_training_step_is_no_forward() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, whole: bool = False) -> Any:
            return {"loss": distillation.mixed(self(x).square().mean())} if whole else self.net(x)

    model = Step()
    distillation = Distillation(0.5, 2.0, model)
    distillation.attach()
    distillation.take()
    distillation.active = True
    model(torch.ones(2, 16), whole=True)
    with pytest.raises(RuntimeError, match="no forward of the model"):
        distillation.mixed(torch.ones((), requires_grad=True))
    distillation.detach()
