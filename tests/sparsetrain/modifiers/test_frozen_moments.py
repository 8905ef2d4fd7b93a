"""Second moments that stay as they were at the end of the dense head, against the equations written out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, train
from oracles import two_of_four
from torch import Tensor, nn

import sparsetrain as st

SWITCH, STEPS = 5, 12
METHOD = {"preset": "step", "latest": SWITCH, "earliest": SWITCH, "decay": 0.05}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and biases under different options, with moments short enough to matter in twelve steps."""
    return [
        {"params": [model[0].weight, model[2].weight], "lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9)},
        {"params": [model[0].bias, model[2].bias], "lr": 3e-3, "weight_decay": 0.02, "betas": (0.9, 0.7), "eps": 1e-4},
    ]


def batch(step: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(step))


def inputs(step: int) -> Tensor:
    """Batches, of which one is unheard of for some of the entries."""
    return batch(step) * (8.0 if step == 9 else 1.0)


def written_out(model: nn.Module, decoupled: bool, maximize: bool = False) -> dict[str, Tensor]:
    """STEP in float64: dense Adam for five steps, then straight-through masks and a second moment that stands still.

    Where a gradient is more than ten times the root of the moment, Adam goes on from it.
    """
    values = {name: value.detach().double().clone() for name, value in model.named_parameters()}
    first, second = ({name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2))
    going = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in values.items()}
    for step in range(STEPS):
        masks = {name: two_of_four(value) for name, value in values.items() if value.dim() == 2 and step >= SWITCH}
        seen = {name: (value * masks.get(name, 1)).requires_grad_() for name, value in values.items()}
        x = inputs(step).double()
        hidden = torch.tanh(x @ seen["0.weight"].t() + seen["0.bias"])
        loss = (hidden @ seen["2.weight"].t() + seen["2.bias"] - x.flip(1)).square().mean()
        (-loss if maximize else loss).backward()
        for name, value in values.items():
            weight = value.dim() == 2
            rate, shrink, (beta1, beta2), epsilon = (
                (1e-2, 0.1, (0.8, 0.9), 1e-8) if weight else (3e-3, 0.02, (0.9, 0.7), 1e-4)
            )
            gradient = seen[name].grad
            if name in masks:
                gradient = gradient + 0.05 * ~masks[name] * value
            gradient = -gradient if maximize else gradient
            if decoupled:
                value = value - rate * shrink * value
            else:
                gradient = gradient + shrink * value
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            if step < SWITCH:
                second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            for place in map(tuple, torch.ones_like(value).nonzero().tolist()) if step >= SWITCH else ():
                held, square = float(second[name][place]), float(gradient[place]) ** 2
                settled = held / (1 - beta2**SWITCH)
                if not going[name][place] and square > 100 * settled:
                    going[name][place] = True
                    held = settled * (1 - beta2**step)
                if going[name][place]:
                    second[name][place] = beta2 * held + (1 - beta2) * square
            corrections = torch.where(going[name], 1 - beta2 ** (step + 1), 1 - beta2 ** min(step + 1, SWITCH))
            scale = second[name] / corrections.double()
            values[name] = value - rate * first[name] / (1 - beta1 ** (step + 1)) / (scale.sqrt() + epsilon)
    assert 0.1 < torch.cat([entries.flatten() for entries in going.values()]).double().mean() < 0.9
    return values


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=str)
def test_twelve_steps_equal_the_equations(kind: type, options: dict[str, Any], maximize: bool) -> None:
    model = mlp()
    expected = written_out(model, kind is torch.optim.AdamW, maximize)
    optimizer = kind(groups(model), maximize=maximize, **options)
    training = st.SparseTraining(model, optimizer, METHOD, STEPS, verbose=False)
    for step in range(STEPS):
        assert training.phase == ("dense" if step < SWITCH else "sparse")
        optimizer.zero_grad()
        loss = (model(inputs(step)) - inputs(step).flip(1)).square().mean()
        (-loss if maximize else loss).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach().double(), expected[name], rtol=1e-4, atol=2e-6)


def run(
    step_of: Callable[[nn.Module, Any, int], None], method: Any = METHOD, **options: Any
) -> tuple[nn.Module, Any, st.SparseTraining]:
    model = mlp()
    optimizer = torch.optim.AdamW(groups(model), **options)
    training = st.SparseTraining(model, optimizer, method, STEPS, verbose=False)
    for step in range(STEPS):
        step_of(model, optimizer, step)
    return model, optimizer, training


def plain_step(model: nn.Module, optimizer: Any, step: int) -> None:
    train(model, optimizer, 1, start=step)


def closure_step(model: nn.Module, optimizer: Any, step: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(batch(step)) - batch(step).flip(1)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None


def accumulated_step(model: nn.Module, optimizer: Any, step: int) -> None:
    optimizer.zero_grad()
    for part in batch(step).chunk(2):
        ((model(part) - part.flip(1)).square().mean() / 2).backward()
    optimizer.step()


def rate_in_a_tensor(model: nn.Module, optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]))
    plain_step(model, optimizer, step)


@pytest.mark.parametrize(
    ("step_of", "options"),
    [(closure_step, {}), (accumulated_step, {}), (rate_in_a_tensor, {"foreach": False})],
    ids=["closure", "accumulation", "rate in a tensor"],
)
def test_it_does_not_matter_how_a_step_is_made(step_of: Any, options: dict[str, Any]) -> None:
    expected, found = run(plain_step)[0], run(step_of, **options)[0]
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adams_own_state_goes_on_but_for_second_moments_and_gradients_stay_visible() -> None:
    going: dict[int, Tensor] = {}
    seen: list[bool] = []

    def look(model: nn.Module, optimizer: Any, step: int) -> None:
        before = {id(p): optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters() if optimizer.state[p]}
        plain_step(model, optimizer, step)
        for parameter in model.parameters():
            state = optimizer.state[parameter]
            assert state["step"].item() == step + 1
            assert parameter.grad is not None
            if step >= SWITCH:
                held, beta2 = before[id(parameter)], 0.9 if parameter.dim() == 2 else 0.7
                unheard_of = parameter.grad.square() > 100 * held / (1 - beta2**SWITCH)
                going[id(parameter)] = going.get(id(parameter), torch.tensor(False)) | unheard_of
                assert torch.equal(state["exp_avg_sq"] == held, ~going[id(parameter)])
            elif step:
                assert not torch.equal(state["exp_avg_sq"], before[id(parameter)])

    model, optimizer, training = run(look)
    assert len(going) == 4
    assert sum(int(entries.sum()) for entries in going.values()) < 100
    optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad is not None))
    optimizer.register_step_post_hook(lambda *_: seen.append(model[0].weight.grad is not None))
    plain_step(model, optimizer, 0)
    assert seen == [True, True]
    training.finish()
    before = optimizer.state[model[0].weight]["exp_avg_sq"].clone()
    plain_step(model, optimizer, 1)
    assert not torch.equal(optimizer.state[model[0].weight]["exp_avg_sq"], before)  # a plain Adam again


def test_it_is_a_field_of_the_method_and_can_be_turned_off() -> None:
    frozen, going_on = run(plain_step)[0], run(plain_step, {**METHOD, "freeze_second_moments": False})[0]
    assert not torch.equal(frozen[0].weight, going_on[0].weight)
    own = st.Method(schedule=st.dense_prune_retrain(SWITCH), freeze_second_moments=True)
    optimizer = run(plain_step, own)[1]
    assert all(state["step"].item() == STEPS for state in optimizer.state.values())


def test_a_step_that_a_scaler_skips_updates_nothing() -> None:
    plain = run(plain_step)[0]
    model = mlp()
    optimizer = torch.optim.AdamW(groups(model))
    training = st.SparseTraining(model, optimizer, METHOD, STEPS, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    attempts = [
        (step, infinite) for step in range(STEPS) for infinite in ((True, False) if step in (2, 5, 9) else (False,))
    ]
    for step, skip in attempts:
        optimizer.zero_grad()
        scaler.scale((model(batch(step)) - batch(step).flip(1)).square().mean()).backward()
        if skip:
            model[0].bias.grad[0] = float("inf")
        before = copy.deepcopy([parameter.detach() for parameter in model.parameters()])
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(ours, theirs) for ours, theirs in zip(before, model.parameters(), strict=True)]
        assert all(same) if skip else not any(same)
    assert training.clock == STEPS
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH, SWITCH + 1])
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_resuming_around_the_switch_equals_the_uninterrupted_run_bit_for_bit(stop: int, optimizer_first: bool) -> None:
    saved: list[Any] = []
    model = mlp()
    optimizer = torch.optim.AdamW(groups(model))
    training = st.SparseTraining(model, optimizer, METHOD, STEPS, verbose=False)
    for step in range(STEPS):
        if step == stop:
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), training.state_dict()])
        plain_step(model, optimizer, step)
    assert ("frozen_moments" not in saved[2]["modifiers"]) == (stop < SWITCH)
    other = mlp(seed=1)
    other.load_state_dict(saved[0])
    again = torch.optim.AdamW(groups(other))
    if optimizer_first:
        again.load_state_dict(saved[1])
    st.SparseTraining(other, again, METHOD, STEPS, state=saved[2], verbose=False)
    if not optimizer_first:
        again.load_state_dict(saved[1])
    for step in range(stop, STEPS):
        plain_step(other, again, step)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert all(torch.equal(optimizer.state[ours][key], again.state[theirs][key]) for key in optimizer.state[ours])


def test_going_back_before_the_switch_lets_adam_go_on() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(groups(model))
    training = st.SparseTraining(model, optimizer, METHOD, STEPS, verbose=False)
    train(model, optimizer, 2)
    early = training.state_dict()
    train(model, optimizer, 5, start=2)
    training.load_state_dict(early)
    before = optimizer.state[model[0].weight]["exp_avg_sq"].clone()
    train(model, optimizer, 1)
    assert not torch.equal(optimizer.state[model[0].weight]["exp_avg_sq"], before)


class WithOthers(nn.Module):
    """Beside a sparse layer: one that is used in the dense head alone, one in the rest alone, a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.early, self.late = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 1)
        self.turn = nn.Parameter(torch.randn(16, dtype=torch.complex64))

    def forward(self, x: Tensor, step: int) -> Tensor:
        hidden = self.body(x)
        turned = (hidden * self.turn).abs().square().mean()
        return turned + (self.early if step < SWITCH else self.late)(hidden).square().mean()


def test_parameters_without_gradients_or_without_moments_are_treated_as_adam_treats_them() -> None:
    model = WithOthers()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    st.SparseTraining(model, optimizer, METHOD, STEPS, targets=["body"], verbose=False)
    oracle: Tensor | None = None
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step), step).backward()
        early = model.early.weight.detach().clone()
        if step == SWITCH:
            oracle = model.late.weight.detach().clone().requires_grad_()
            plain = torch.optim.Adam([oracle], lr=1e-2)
        optimizer.step()
        assert torch.equal(model.early.weight, early) == (step >= SWITCH)
        if oracle is not None:
            oracle.grad = model.late.weight.grad.clone()
            plain.step()
            assert torch.equal(model.late.weight, oracle)
    assert optimizer.state[model.early.weight]["step"].item() == SWITCH


def test_every_optimizer_that_is_passed_is_frozen() -> None:
    model, reference = mlp(), mlp()
    head, tail = model[0], model[2]
    optimizers = [torch.optim.AdamW(part, lr=1e-2) for part in (head.parameters(), [tail.weight], [tail.bias])]
    single = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    st.SparseTraining(model, optimizers, METHOD, STEPS, verbose=False)
    st.SparseTraining(reference, single, METHOD, STEPS, verbose=False)
    for step in range(STEPS):
        for entry in (model, reference):
            entry.zero_grad()
            (entry(batch(step)) - batch(step).flip(1)).square().mean().backward()
        for optimizer in (optimizers[2], *optimizers[:2], single):  # the bias has no part in the clock
            optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_that_raises_leaves_gradients_and_weights() -> None:
    model, optimizer, _ = run(plain_step)
    optimizer.zero_grad()
    model(batch(0)).square().mean().backward()
    before = copy.deepcopy([(p.detach(), p.grad) for p in model.parameters()])

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    handle.remove()
    for (weight, gradient), parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(weight, parameter)
        assert torch.isfinite(gradient).all()
        assert parameter.grad is not None
    optimizer.step()
    assert not torch.equal(before[0][0], model[0].weight)


def test_a_copy_of_the_optimizer_is_a_plain_one() -> None:
    optimizer = copy.deepcopy(run(plain_step)[1])
    weight = optimizer.param_groups[0]["params"][0]
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(optimizer.state[weight]["exp_avg_sq"], before)


class OwnAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (
            OwnAdam,
            METHOD,
            r"^optimizer is OwnAdam but freeze_second_moments needs torch\.optim\.Adam or AdamW itself: ",
        ),
        (torch.optim.RAdam, METHOD, r"^optimizer is RAdam but freeze_second_moments needs "),
        (lambda p: torch.optim.Adam(p, amsgrad=True), METHOD, r"^optimizer is Adam with amsgrad=True but "),
        (lambda p: torch.optim.AdamW(p, fused=True), METHOD, r"^optimizer is AdamW with fused=True but "),
        (lambda p: torch.optim.AdamW(p, differentiable=True), METHOD, r"^optimizer is AdamW with differentiable=True "),
        (torch.optim.AdamW, {**METHOD, "latest": 0, "earliest": None}, r"first phase is sparse: begin with a dense "),
    ],
    ids=["subclass", "another", "amsgrad", "fused", "differentiable", "no dense head"],
)
def test_what_cannot_be_right_is_refused_before_anything_is_changed(make: Any, method: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        st.SparseTraining(model, make(model.parameters()), method, STEPS, verbose=False)
    assert type(model[0]) is nn.Linear


def test_a_state_of_other_optimizers_is_refused() -> None:
    state = run(plain_step)[2].state_dict()
    model = mlp()
    optimizer = torch.optim.AdamW([model[0].weight, model[2].weight])
    with pytest.raises(ValueError, match=r"^state has frozen moments of \[4\] parameters but .* have \[2\]: "):
        st.SparseTraining(model, optimizer, METHOD, STEPS, state=state, verbose=False)
    assert type(model[0]) is nn.Linear
