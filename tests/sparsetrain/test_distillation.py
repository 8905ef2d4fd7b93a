"""The teacher's part in the loss, against computations that know nothing of the engine."""

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from support import mlp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.methods import dense_to_sparse_finetune, fst
from sparsetrain.modifiers.distillation import Distillation, softened_divergence

METHOD = dense_to_sparse_finetune(0.05, decay_ramp=4, freeze_at=8, refresh_every=2, distillation=0.67)
STEPS = 12


def teacher_of(training: st.SparseTraining) -> nn.Module:
    (found,) = (modifier for modifier in training._modifiers if isinstance(modifier, Distillation))
    assert found.teacher is not None
    return found.teacher


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 16, generator=generator), torch.randint(16, (rows,), generator=generator)


def start(model: nn.Module, method: Any = METHOD, **options: Any) -> tuple[torch.optim.Optimizer, st.SparseTraining]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, st.SparseTraining(model, optimizer, method, STEPS, verbose=False, **options)


def run(
    model: nn.Module, optimizer: Any, training: st.SparseTraining, first: int = 0, last: int = STEPS,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        training.distilled(F.cross_entropy((forward or model)(x), y)).backward()
        optimizer.step()


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """From the definition, one position at a time."""
    total = torch.zeros((), dtype=torch.float64)
    rows = student.double().reshape(-1, student.shape[-1]), teacher.double().reshape(-1, student.shape[-1])
    for ours, theirs in zip(*rows, strict=True):
        q, p = (torch.exp(row / temperature) / torch.exp(row / temperature).sum() for row in (ours, theirs))
        total = total + (p * torch.log(p / q)).sum()
    return total * temperature**2 / len(rows[0])


# what is computed


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_and_its_gradient_equal_the_definition(temperature: float) -> None:
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 7)
    expected = divergence(student, teacher, temperature)
    (wanted,) = torch.autograd.grad(expected, student)
    found = softened_divergence(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted.double(), rtol=1e-5, atol=1e-6)
    assert softened_divergence(student.bfloat16(), teacher.bfloat16(), 2.0).dtype == torch.float32


def row_wise(weight: Tensor) -> Tensor:
    groups = weight.detach().abs().reshape(-1, 4)
    return (groups.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < 2).reshape(weight.shape)


def test_training_equals_a_loop_by_hand() -> None:
    model = mlp()
    plain = [parameter.detach().double().clone().requires_grad_() for parameter in model.parameters()]
    dense = [parameter.detach().clone() for parameter in plain]

    def logits(x: Tensor, w: list[Tensor]) -> Tensor:
        return torch.tanh(x.double() @ w[0].t() + w[1]) @ w[2].t() + w[3]

    optimizer, training = start(model)
    moments: list[list[Any]] = [[0.0, 0.0] for _ in plain]
    terms = []
    for step in range(STEPS):
        run(model, optimizer, training, step, step + 1)
        terms.append(training.metrics()["distillation"])
        x, y = batch(step)
        if step < 8 and step % 2 == 0:
            masks = [row_wise(plain[0]), row_wise(plain[2])]
        if step == 8:
            for weight, mask in zip((plain[0], plain[2]), masks, strict=True):
                weight.data *= mask
        used = list(plain)
        for place, mask in zip((0, 2), masks, strict=True):
            used[place] = plain[place] + (plain[place] * mask - plain[place]).detach()
        outputs = logits(x, used)
        term = divergence(outputs, logits(x, dense), 2.0)
        loss = 0.33 * F.cross_entropy(outputs, y) + 0.67 * term
        assert terms[-1] == pytest.approx(term.item(), rel=1e-4)
        gradients = list(torch.autograd.grad(loss, plain))
        for place, mask in zip((0, 2), masks, strict=True):
            if step < 8:
                gradients[place] = gradients[place] + 0.05 * min(1, (step + 1) / 4) * ~mask * plain[place].detach()
            else:
                gradients[place] = gradients[place] * mask
        for place, gradient in enumerate(gradients):
            m, v = moments[place]
            moments[place] = [0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2]
            m, v = moments[place]
            change = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            plain[place].data = plain[place].data * (1 - 1e-2 * 0.01) - 1e-2 * change
        if step >= 8:
            for weight, mask in zip((plain[0], plain[2]), masks, strict=True):
                weight.data *= mask
    assert terms[0] > 0
    for ours, theirs in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=1e-4, atol=2e-6)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch() -> None:
    whole, parts = mlp(), mlp()
    (_, training), (_, other) = start(whole), start(parts)
    x, y = batch(0)
    training.distilled(F.cross_entropy(whole(x), y)).backward()
    for half in (slice(0, 4), slice(4, 8)):
        (other.distilled(F.cross_entropy(parts(x[half]), y[half])) / 2).backward()
    for ours, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_teacher_runs_under_the_autocast_of_the_forward() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    _, training = start(model)
    x, y = batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        logits, target = model(x), dense(x).detach()
    loss = training.distilled(F.cross_entropy(logits, y).bfloat16())
    assert loss.dtype == torch.float32
    assert training.metrics()["distillation"] == pytest.approx(
        float(divergence(logits.detach(), target, 2.0)), rel=1e-4
    )
    training.finish()


# who the teacher is


class Noisy(nn.Module):
    """Dropout, statistics of batches, a tie, and logits in an object."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: types.SimpleNamespace(logits=logits)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.tied = self.norm.weight
        self.wrap = wrap

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        return self.wrap(self.second(self.drop(self.norm(self.first(x)))) * scale)


@pytest.mark.parametrize(
    "wrap", [lambda logits: types.SimpleNamespace(logits=logits), lambda logits: {"logits": logits, "cache": 1}]
)
def test_the_teacher_is_the_dense_model_in_evaluation_mode_and_stays_so(wrap: Callable[[Tensor], Any]) -> None:
    model = Noisy(wrap)
    keys, count = list(model.state_dict()), len(list(model.parameters()))
    dense = copy.deepcopy(model).eval()
    optimizer, training = start(model)
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        output = model(x, scale=2.0)
        logits = output["logits"] if isinstance(output, dict) else output.logits
        training.distilled(F.cross_entropy(logits, y)).backward()
        target = dense(x, scale=2.0)
        target = target["logits"] if isinstance(target, dict) else target.logits
        expected = divergence(logits.detach(), target.detach(), 2.0)
        assert training.metrics()["distillation"] == pytest.approx(float(expected), rel=1e-4)
        optimizer.step()
    teacher = teacher_of(training)
    assert same(teacher, dense)
    assert not any(module.training or isinstance(module, st.SparseLinear) for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == count
    saved = training.state_dict()["modifiers"]["distillation"]["teacher"]
    assert saved["tied"].data_ptr() == saved["norm.weight"].data_ptr() != teacher.tied.data_ptr()


def test_after_a_dense_head_the_teacher_is_what_the_head_trained() -> None:
    method = st.Method(distillation=0.5, schedule=st.from_scratch(3, 3), refresh_every=2)
    model, plain = mlp(), mlp()
    optimizer, training = start(model, method)
    loss = model(batch(0)[0]).sum()
    assert training.distilled(loss) is loss
    assert training.state_dict()["modifiers"]["distillation"]["teacher"] is None
    run(model, optimizer, training, 0, 3)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for step in range(3):
        x, y = batch(step)
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.step()
    assert same(teacher_of(training), plain)
    run(model, optimizer, training, 3, 9)
    assert training.phase == "dense"
    loss = model(batch(0)[0]).sum()
    assert training.distilled(loss) is loss
    run(model, optimizer, training, 9)


def test_a_frozen_start_teaches_from_weights_without_zeros() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    optimizer, training = start(model, st.Method(distillation=1.0, schedule=st.dense_prune_retrain(0)))
    assert (model[0].weight == 0).any()
    run(model, optimizer, training)
    assert same(teacher_of(training), dense)


def test_a_teacher_of_the_user_and_a_student_inside() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.net(x), y)

    model, teacher = Whole(), nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    _, training = start(model, teacher=teacher, logits_from="net")
    x, y = batch(0)
    training.distilled(model(x, y)).backward()
    expected = divergence(model.net(x).detach(), teacher[0](x).detach(), 2.0)
    assert training.metrics()["distillation"] == pytest.approx(float(expected), rel=1e-4)


# what counts as the forward


def test_evaluation_and_forwards_without_gradients_do_not_count() -> None:
    plain, other = mlp(), mlp()
    optimizer, training = start(plain)
    run(plain, optimizer, training)

    def forward(x: Tensor) -> Tensor:
        logits = other(x)
        with torch.no_grad():
            other(torch.randn(3, 16))
            loss = other(x).sum()
            assert distilling.distilled(loss) is loss
        other.eval()(torch.randn(3, 16))
        other.train()
        return logits

    optimizer, distilling = start(other)
    run(other, optimizer, distilling, forward=forward)
    assert same(plain, other)


@pytest.mark.parametrize(("reentrant", "whole"), [(True, False), (False, False), (False, True)])
def test_recomputation_is_no_forward(reentrant: bool, whole: bool) -> None:
    class Blocks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](checkpoint(lambda x: self[1](self[0](x)), x.requires_grad_(), use_reentrant=reentrant))

    plain = mlp()
    optimizer, training = start(plain)
    run(plain, optimizer, training)
    other = mlp() if whole else Blocks(*mlp())
    optimizer, training = start(other)
    run(
        other, optimizer, training,
        forward=lambda x: checkpoint(other, x, use_reentrant=reentrant) if whole else other(x),
    )  # fmt: skip
    assert same(plain, other)


def test_compiled_students_are_one_graph_and_are_not_recompiled_by_steps() -> None:
    plain, other = mlp(), mlp()
    optimizer, training = start(plain)
    run(plain, optimizer, training, 0, 8)
    counter = CompileCounterWithBackend("aot_eager")
    optimizer, training = start(other)
    run(other, optimizer, training, 0, 8, forward=torch.compile(other, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    for ours, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, which it hides
@pytest.mark.parametrize("how", ["wrapper", "call", "forward", "part"])
def test_the_teacher_of_a_compiled_model_is_no_disguise_of_the_student(how: str) -> None:
    class Module(LightningModule):  # whose copies keep what compile() left
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Module()
    dense = copy.deepcopy(module)
    model: Any = module
    if how == "wrapper":
        model = torch.compile(module, backend="eager")
    elif how == "call":
        module.compile(backend="eager")
    elif how == "forward":
        module.forward = torch.compile(module.forward, backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    _, training = start(model)
    x, y = batch(0)
    logits = model(x)
    training.distilled(F.cross_entropy(logits, y)).backward()
    expected = divergence(logits.detach(), dense(x).detach(), 2.0)
    torch._dynamo.reset()
    assert float(expected) > 1e-4
    assert training.metrics()["distillation"] == pytest.approx(float(expected), rel=1e-3)


def test_a_data_parallel_model_is_its_own_student(tmp_path: Path) -> None:
    plain, other = mlp(), mlp()
    optimizer, training = start(plain)
    run(plain, optimizer, training)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(other)
        optimizer, training = start(model)
        run(model, optimizer, training)
    finally:
        dist.destroy_process_group()
    assert same(plain, other)
    assert all(name.startswith("module.") for name in model.state_dict())


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
            r"^state has no teacher but .* is 0\.67: pass one as teacher, .*\.$",
        ),
        (
            lambda state: state["modifiers"].update(distillation=3),
            r"^state\['modifiers'\]\['distillation'\] is 3: .* damaged\.$",
        ),
        (lambda state: state["modifiers"]["distillation"].update(teacher=None), r"^state has no teacher but .*\.$"),
        (
            lambda state: state["modifiers"]["distillation"].update(given=True),
            r"^state is of a run with a teacher .* as teacher\.$",
        ),
        (
            lambda state: state["modifiers"]["distillation"]["teacher"].pop("2.bias"),
            r"^state has a teacher whose '2\.bias' .*\.$",
        ),
        (
            lambda state: state["modifiers"]["distillation"]["teacher"].update(more=torch.ones(1)),
            r"^state .* whose 'more' .*\.$",
        ),
        (
            lambda state: state["modifiers"]["distillation"]["teacher"].update({"0.weight": torch.ones(4, 4)}),
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
