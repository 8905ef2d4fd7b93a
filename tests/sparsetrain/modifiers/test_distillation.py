"""The teacher's part in the loss, against computations that know nothing of the engine."""

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distilled_runs import STEPS, Noisy, batch, divergence, run, same, start, teacher_of
from lightning.pytorch import LightningModule
from models import mlp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.modifiers.distillation import softened_divergence

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
