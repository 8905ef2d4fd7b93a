"""``SparseAdamW`` in a run: what it does at once is what torch's AdamW and the engine do one after the other."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_runs import Regression, batches
from models import convnet, mlp, train
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from torch.optim import lr_scheduler

import sparsetrain as st
from sparsetrain.backends import BACKENDS, packing
from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.kernels.pack.reference import unpack_rows
from sparsetrain.optim import SparseAdamW

STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "recommended": {"warmup": 2, "refresh_every": 3, "decay": 0.05, "freeze": 3, "lr_factor": 1.0},
    "fst": {"warmup": 1, "refresh_every": 3, "decay": 0.05, "dense_tail": 1},
    "asp_one_shot": {"prune_at": 3},
    "sr_ste": {"decay": 0.05},
    "slope": {"refresh_every": 3, "adapter_start": 6, "adapter_rank": 2},
}
CLOSE = "recommended, twice the rate"
"""Inside the update of the one, behind that of the other: equal within rounding."""

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def method(name: str, **changes: Any) -> dict[str, Any]:
    if name == CLOSE:
        return method("recommended", lr_factor=2.0, **changes)
    return {"preset": name, **METHODS[name], **changes}


class Run:
    """A model, its optimizer and its run."""

    def __init__(
        self, kind: type[torch.optim.AdamW], name: str = "recommended", model: nn.Module | None = None, seed: int = 0,
        backend: str = "auto", state: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        self.model = mlp(seed=seed) if model is None else model
        self.optimizer = kind(self.model.parameters(), **{**OPTIONS, **options})
        self.training = st.SparseTraining(
            self.model, self.optimizer, method(name), STEPS, backend=backend, state=state, verbose=False
        )

    @property
    def numbers(self) -> list[Tensor]:
        """Everything that training changes."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        codes = list(self.training.masks.codes.values()) if not self.training.finished else []
        return [*(one.detach() for one in self.model.parameters()), *moments, *codes]


def require_equal(first: Run, second: Run) -> None:
    assert len(first.numbers) == len(second.numbers)
    for one, other in zip(first.numbers, second.numbers, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    backend = SimulatedBackend(native=True)
    monkeypatch.setitem(BACKENDS, "simulated", backend)
    return backend


@pytest.mark.parametrize("options", [{}, {"maximize": True, "eps": 1e-3, "betas": (0.4, 0.9)}], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_the_one_with_torchs_adamw_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    theirs, ours = Run(torch.optim.AdamW, name, **options), Run(SparseAdamW, name, **options)
    for step in range(STEPS):
        for run in (theirs, ours):
            train(run.model, run.optimizer, 1, start=step, clip=0.5)
        require_equal(ours, theirs)
        assert ours.training.phase == theirs.training.phase
        assert ours.training.metrics()["violations"] == 0
    assert ours.training.clock == STEPS
    for run in (theirs, ours):
        run.training.finish()
    require_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_higher_rate_is_the_same_within_rounding(dtype: torch.dtype) -> None:
    theirs, ours = (Run(kind, CLOSE, mlp().to(dtype)) for kind in (torch.optim.AdamW, SparseAdamW))
    for run in (theirs, ours):
        train(run.model, run.optimizer, STEPS)
    close = 1e-6 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(ours.numbers, theirs.numbers, rtol=0, atol=close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["recommended", "sr_ste"])
def test_so_it_is_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    theirs, ours = (Run(kind, name, mlp().to(dtype), eps=1e-3) for kind in (torch.optim.AdamW, SparseAdamW))
    for run in (theirs, ours):
        train(run.model, run.optimizer, STEPS)
    require_equal(ours, theirs)


def test_convolutions_and_several_groups_are_updated_as_by_torch() -> None:
    runs = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        model = nn.Sequential(convnet(), mlp())
        groups = [
            {"params": [one for one in model.parameters() if one.dim() > 1]},
            {"params": [one for one in model.parameters() if one.dim() == 1], "weight_decay": 0.0, "lr": 0.1},
        ]
        optimizer = kind(groups, **OPTIONS)
        training = st.SparseTraining(
            model, optimizer, method("recommended"), STEPS, targets=["all-linear", "all-conv"], verbose=False
        )
        assert len(training.masks.layers) >= 3
        train(model, optimizer, STEPS)
        runs.append([*model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["recommended", CLOSE, "fst", "asp_one_shot"])
def test_operands_are_packed_once_a_step_and_hold_the_updated_weights(
    name: str, native: bool, simulated: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated.native = native
    packs: list[int] = []
    pack = packing.pack_tiles_now_
    monkeypatch.setattr(packing, "pack_tiles_now_", lambda *lists: (packs.append(len(lists[0])), pack(*lists))[1])
    counts: dict[type, list[int]] = {}
    runs = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        run = Run(kind, name, backend="simulated")
        counts[kind] = []
        for step in range(STEPS):
            layers, phase = run.training.masks.layers.values(), run.training.phase
            are_made = all(layer.operands.bytes for layer in layers)
            packs.clear()
            train(run.model, run.optimizer, 1, start=step)
            if are_made and phase == run.training.phase and not run.training.refreshed:
                counts[kind].append(sum(packs))
            for layer in layers:
                for (_, product, dtype), operand in layer.operands._made.items():
                    meta = operand.tensors[1] if native else operand.tensors[1].flip(0, 1)
                    wanted = (layer.weight.detach() * layer.mask).to(dtype)
                    found = unpack_rows(operand.tensors[0], meta)
                    assert torch.equal(found, wanted.t() if product == "input_gradient" else wanted)
        runs.append(run)
    if name == CLOSE:
        torch.testing.assert_close(runs[0].numbers, runs[1].numbers, rtol=0, atol=1e-6)
    else:
        require_equal(*runs)
    assert len(counts[SparseAdamW]) >= 3
    assert set(counts[torch.optim.AdamW]) == {2}  # every layer, after the step
    assert set(counts[SparseAdamW]) == {0 if native else 2}  # inside it, where the packer can write all


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda _: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-3, 1e-2, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=9),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.1), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    every = {
        name for name, kind in vars(lr_scheduler).items() if isinstance(kind, type) and not name.startswith("_")
        and issubclass(kind, lr_scheduler.LRScheduler) and kind is not lr_scheduler.LRScheduler
    }  # fmt: skip
    assert every == set(SCHEDULES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scheduler_gives_the_rates_that_it_gives_torchs(schedule: str) -> None:
    runs = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        run = Run(kind, model=mlp(hidden=8))
        scheduler = SCHEDULES[schedule](run.optimizer)
        for step in range(6):
            train(run.model, run.optimizer, 1, start=step)
            scheduler.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
        runs.append(run)
    require_equal(*runs)
    assert runs[0].optimizer.param_groups[0]["lr"] == runs[1].optimizer.param_groups[0]["lr"]


def test_a_grad_scaler_unscales_and_skips() -> None:
    runs = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        run, clocks = Run(kind), []
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        for step in range(STEPS):
            run.optimizer.zero_grad()
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            scaler.scale(run.model(x).square().mean()).backward()
            if step == 6:
                run.model[0].weight.grad[0, 0] = float("inf")
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.3)
            scaler.step(run.optimizer)
            scaler.update()
            clocks.append(run.training.clock)
        assert clocks == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]
        runs.append(run)
    require_equal(*runs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_trains_with_it_as_with_torchs(accumulate: int) -> None:
    class Ours(Regression):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SparseAdamW(self.parameters(), lr=self.hparams["lr"])

    found = []
    for kind in (Regression, Ours):
        torch.manual_seed(0)
        module, callback = kind(), SparseTrainingCallback(method("recommended"), targets="net")
        trainer = Trainer(
            max_steps=STEPS, callbacks=[callback], accumulate_grad_batches=accumulate, gradient_clip_val=0.5,
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu",
        )  # fmt: skip
        trainer.fit(module, batches(16 * accumulate * STEPS // 4))
        assert trainer.global_step == STEPS
        found.append([*module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("saved_by", [torch.optim.AdamW, SparseAdamW])
@pytest.mark.parametrize("resumed_by", [torch.optim.AdamW, SparseAdamW])
@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_run_goes_on_from_either_optimizers_state_bit_for_bit(
    saved_by: type[torch.optim.AdamW], resumed_by: type[torch.optim.AdamW], at: int
) -> None:
    whole = Run(saved_by)
    train(whole.model, whole.optimizer, at)
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict(), whole.training.state_dict()))
    train(whole.model, whole.optimizer, STEPS - at, start=at)
    model = mlp(seed=1)
    model.load_state_dict(saved[0])
    resumed = Run(resumed_by, model=model, state=saved[2])
    resumed.optimizer.load_state_dict(saved[1])
    train(resumed.model, resumed.optimizer, STEPS - at, start=at)
    require_equal(resumed, whole)


def test_a_state_of_a_fused_or_capturable_adamw_is_taken_over() -> None:
    run = Run(torch.optim.AdamW, fused=True)
    train(run.model, run.optimizer, 4)
    state = run.optimizer.state_dict()
    state["param_groups"][0]["capturable"] = True
    for entry in state["state"].values():
        entry["step"] = entry["step"].double()
    ours = SparseAdamW(run.model.parameters())
    ours.load_state_dict(state)
    (group,) = ours.param_groups
    assert not any(group[name] for name in ("fused", "capturable", "differentiable", "amsgrad"))
    steps = [entry["step"] for entry in ours.state.values()]
    assert all(step.dtype == torch.float32 and step.device.type == "cpu" and step == 4 for step in steps)
    assert set(group) == set(run.optimizer.param_groups[0])
    ours.step()


def test_without_a_run_it_is_torchs_adamw() -> None:
    theirs, ours = mlp(), mlp()
    st.sparsify_(ours, verbose=False)
    st.sparsify_(theirs, verbose=False)
    optimizers = torch.optim.AdamW(theirs.parameters(), **OPTIONS), SparseAdamW(ours.parameters(), **OPTIONS)
    for model, optimizer in zip((theirs, ours), optimizers, strict=True):
        train(model, optimizer, 4)
    assert all(torch.equal(one, other) for one, other in zip(theirs.parameters(), ours.parameters(), strict=True))
    copied = pickle.loads(pickle.dumps(optimizers[1]))
    assert copied.state_dict()["param_groups"] == optimizers[0].state_dict()["param_groups"]
    assert isinstance(copy.deepcopy(optimizers[1]), torch.optim.AdamW)


def test_gradients_stay_as_backward_left_them() -> None:
    run = Run(SparseAdamW)
    train(run.model, run.optimizer, 4)
    run.optimizer.zero_grad()
    run.model(torch.randn(8, 16)).square().mean().backward()
    before = run.model[0].weight.grad.clone()
    run.optimizer.step()
    assert run.training.phase == "sparse"
    assert torch.equal(run.model[0].weight.grad, before)


def test_several_optimizers_and_parameters_without_gradients() -> None:
    runs = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        model = mlp()
        optimizers = [kind(model[0].parameters(), **OPTIONS), torch.optim.AdamW(model[2].parameters(), **OPTIONS)]
        training = st.SparseTraining(model, optimizers, method("recommended"), STEPS, verbose=False)
        for step in range(STEPS):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            if step == 5:
                model[0].weight.grad = None
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert training.clock == STEPS
        runs.append([*model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable", "fused"])
def test_options_that_it_has_not_are_refused_in_one_sentence(option: str, weight: nn.Parameter) -> None:
    with pytest.raises(
        ValueError,
        match=rf"^SparseAdamW is given {option}=True but must have {option}=False: [^.]*torch\.optim\.AdamW\.$",
    ):
        SparseAdamW([weight], **{option: True})
    with pytest.raises(ValueError, match=f"SparseAdamW has a group with {option}=True"):
        SparseAdamW([{"params": [weight], option: True}])


def test_states_with_amsgrad_are_refused_before_anything_is_changed(weight: nn.Parameter) -> None:
    theirs, ours = torch.optim.AdamW([weight], lr=0.5, amsgrad=True), SparseAdamW([weight], lr=0.1)
    with pytest.raises(ValueError, match="SparseAdamW is given a state with amsgrad=True"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.1


def test_wrong_numbers_are_refused_as_by_torch(weight: nn.Parameter) -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SparseAdamW([weight], lr=-1.0)


def test_frozen_second_moments_are_refused_in_one_sentence() -> None:
    model = mlp()
    with pytest.raises(
        ValueError, match=r"optimizer is SparseAdamW but freeze_second_moments needs torch.optim.Adam or"
    ):
        st.SparseTraining(model, SparseAdamW(model.parameters()), "step", 100)
    assert type(model[0]) is nn.Linear


def test_an_optimizer_that_has_one_inside_is_not_taken_for_it() -> None:
    """One that passes unknown attributes on has no kernel of its own; its decay is done before its step."""

    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner
            super().__init__(inner.param_groups, {})

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.inner.step()

    weights = []
    for kind in (torch.optim.AdamW, SparseAdamW):
        model = mlp()
        optimizer = Around(kind(model.parameters(), lr=1e-2))
        st.SparseTraining(model, optimizer, {"preset": "sr_ste", "decay": 0.5}, 12, verbose=False)
        train(model, optimizer, 4)
        weights.append([weight.detach().clone() for weight in model.parameters()])
    assert all(map(torch.equal, *weights))
