"""Adapters that begin in mid-run, under every optimizer of torch, and from checkpoints without them."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning_runs import Regression, batches
from models import mlp
from torch import nn
from torch.optim import Optimizer

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback

START, STEPS = 4, 7
SLOPE = {"preset": "slope", "adapter_rank": 2, "adapter_start": START, "refresh_every": 3}

KINDS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05},
    "SGD with momentum": {"lr": 0.05, "momentum": 0.9},
    "SGD with Nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "SGD with dampening": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
    "Adam": {}, "AdamW": {"amsgrad": True}, "Adagrad": {}, "RMSprop": {"momentum": 0.9}, "NAdam": {}, "RAdam": {},
    "Adadelta": {}, "Adamax": {}, "ASGD": {}, "Rprop": {}, "LBFGS": {"max_iter": 2}, "Adafactor": {}, "Muon": {},
}  # fmt: skip
HAS_FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
HAS_FOREACH = (*HAS_FUSED, "RMSprop", "NAdam", "RAdam", "Adadelta", "Adamax", "ASGD", "Rprop", "Adafactor")
CASES = [
    (kind, variant)
    for kind in KINDS
    for variant, having in (("", tuple(KINDS)), ("foreach", HAS_FOREACH), ("fused", HAS_FUSED))
    if kind.split()[0] in having or not variant
]


REFUSED = {
    ("SGD with dampening", "fused"): (
        r"^optimizer is SGD with fused=True and dampening=0\.1 but adapters begin in mid-run, .* fused=False"
    ),
    ("LBFGS", ""): "^optimizer is LBFGS but adapters join its parameters in mid-run, .*: use another optimizer, or",
}


def build(kind: str, variant: str) -> tuple[nn.Module, Optimizer]:
    name = kind.split()[0]
    model = mlp(bias=name != "Muon")  # which takes matrices alone
    options = {**KINDS[kind], **({variant: True} if variant else {})}
    return model, getattr(torch.optim, name)(model.parameters(), **options)


def run(model: nn.Module, optimizer: Optimizer, start: int, end: int) -> None:
    for step in range(start, end):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))

        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


def start(kind: str, variant: str, state: Any = None) -> tuple[nn.Module, Optimizer, st.SparseTraining]:
    model, optimizer = build(kind, variant)
    return model, optimizer, st.SparseTraining(model, optimizer, SLOPE, STEPS, state=state, verbose=False)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_adapters_begin_and_resume_bit_for_bit_or_are_refused_at_the_start(kind: str, variant: str) -> None:
    if (kind, variant) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind, variant]):
            start(kind, variant)
        return
    model, optimizer, training = start(kind, variant)
    saved = {}
    for step in range(STEPS):
        saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
        run(model, optimizer, step, step + 1)
        assert any(bool(up.any()) for _, up in training.adapters().values()) == (step >= START)
    for stop in (START - 1, START, START + 1):
        weights, moments, state = saved[stop]
        other, other_optimizer, resumed = start(kind, variant, state)
        other.load_state_dict(weights)
        other_optimizer.load_state_dict(moments)
        run(other, other_optimizer, stop, STEPS)
        for name, value in other.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (stop, name)
        for name, pair in resumed.adapters().items():
            assert all(map(torch.equal, pair, training.adapters()[name])), (stop, name)


def test_fused_momentum_begins_as_that_of_a_plain_loop() -> None:
    """Fused and plain SGD, from the same weights, go the same way when adapters begin."""
    ends = []
    for variant in ("", "fused"):
        model, optimizer, training = start("SGD with momentum", variant)
        run(model, optimizer, 0, STEPS)
        ends.append([*model.parameters(), *(part for pair in training.adapters().values() for part in pair)])
    for plain, fused in zip(*ends, strict=True):
        torch.testing.assert_close(plain, fused, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["SGD with momentum", "AdamW", "Muon"])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_the_optimizer_of_a_dense_run_saved_loads_beside_adapters(kind: str, groups: int) -> None:
    def split(model: nn.Sequential) -> Any:
        return (
            model.parameters()
            if groups == 1
            else [{"params": model[0].parameters()}, {"params": [*model[2].parameters()]}]
        )

    name = kind.split()[0]
    dense = mlp(bias=name != "Muon")
    saver = getattr(torch.optim, name)(split(dense), **KINDS[kind])
    run(dense, saver, 0, 3)
    model = mlp(bias=name != "Muon")
    optimizer = getattr(torch.optim, name)(split(model), **KINDS[kind])
    training = st.SparseTraining(model, optimizer, SLOPE, STEPS, verbose=False)
    saved = copy.deepcopy(saver.state_dict())
    optimizer.load_state_dict(saved)
    assert [group["params"] for group in saved["param_groups"]] == [
        group["params"] for group in saver.state_dict()["param_groups"]
    ]
    for weight, other in zip(dense.parameters(), model.parameters(), strict=True):
        mine, theirs = optimizer.state[other], saver.state[weight]
        assert mine.keys() == theirs.keys() != set()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine if isinstance(mine[key], torch.Tensor))
    run(model, optimizer, 0, STEPS)
    assert all(bool(up.any()) for _, up in training.adapters().values())
    training.finish()
    optimizer.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:checkpoint has no 'sparsetrain' state:UserWarning")
def test_slope_goes_on_from_a_dense_checkpoint(tmp_path: Any) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "dense.ckpt")

    def fit(callback: Callback, path: Any = None) -> Regression:
        module = Regression()
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_steps=9, accelerator="cpu", enable_checkpointing=False, callbacks=[callback], **options)
        trainer.fit(module, batches(), ckpt_path=path)
        assert trainer.global_step == 9
        return module

    fit(Save())
    method = {"preset": "slope", "adapter_rank": 2, "adapter_start": 3, "adapter_merge": False}
    callback = SparseTrainingCallback(method)
    module = fit(callback, tmp_path / "dense.ckpt")
    assert (module.net[0].weight == 0).float().mean() == 0.5
    assert all(bool(up.any()) for _, up in callback.training.adapters().values())


def test_a_method_with_adapters_refuses_a_state_without_them() -> None:
    plain = {"preset": "slope", "adapter_rank": 0}
    model = mlp()
    state = st.SparseTraining(model, torch.optim.SGD(model.parameters()), plain, STEPS, verbose=False).state_dict()
    other = mlp()
    with pytest.raises(ValueError, match=r"^state has no adapters but the method's adapter_rank is not 0: resume with"):
        st.SparseTraining(other, torch.optim.SGD(other.parameters()), SLOPE, STEPS, state=state, verbose=False)
    assert type(other[0]) is nn.Linear
