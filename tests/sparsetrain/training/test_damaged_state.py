"""Damaged states: every one is refused with a sentence before anything is changed, or loads to a valid state."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from models import mlp, train
from mutations import mutations, sampled
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.methods import fst

SAMPLE = 4
"""Mutations under each key of a state; all of them are some fifty thousand."""

TOTAL = 20


class Recent(st.Criterion):
    """A user's criterion with a state of its own, which it does not check."""

    name = "recent"
    needs = frozenset({"gradient"})

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        return self.last.get(layer, weight).abs()

    def observe_gradient(self, layer: str, weight: Tensor, gradient: Tensor, scale: Tensor | None) -> None:
        self.last[layer] = gradient.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"last": {name: value.clone() for name, value in self.last.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = {}
        for name, value in state["last"].items():
            self.last[name] = torch.zeros(32 if name == "0" else 16, 16 if name == "0" else 32).copy_(value)


@dataclass
class Run:
    """A run in the middle."""

    model: nn.Sequential
    optimizers: list[torch.optim.Optimizer]
    training: st.SparseTraining
    step: int

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def layers(self) -> dict[str, Any]:
        """All that a load can change in a layer."""
        return {
            name: {
                "codes": layer.mask_codes.clone(), "phase": layer.phase, "soft": copy.deepcopy(layer.soft_scale),
                "backward": None if layer.backward_codes is None else layer.backward_codes.clone(),
                "adapted": layer.adapter is not None, "rule": layer.gradient, "sparse": layer.is_2_4,
            }
            for name, layer in self.training.masks.layers.items()
        }  # fmt: skip

    def snapshot(self) -> Any:
        groups = [
            dict(sorted({**group, "params": list(map(id, group["params"]))}.items()))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        return self.training.state_dict(), self.weights(), self.layers(), copy.deepcopy(groups)

    def go_on(self) -> None:
        """One step, of every optimizer that is to step."""
        for optimizer in self.optimizers:
            if self.training.method.distillation:
                train(self.model, optimizer, 1, start=self.step, distilled=self.training.distilled)
            else:
                train(self.model, optimizer, 1, start=self.step)


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


def two(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[2].parameters(), lr=0.1)]


HEAD = {"preset": "fst", "warmup": 4, "dense_tail": 6, "refresh_every": 2}
RUNS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "before the first mask": ({**HEAD, "criterion": "wanda"}, 3, {"watch_dense": False}),
    "fst in its head": ({**HEAD, "decay": "auto"}, 3, {"track_age": True}),
    "fst": ({**HEAD, "decay": "auto"}, 9, {"track_age": True}),
    "fst in its tail": (HEAD, 17, {}),
    "wanda": ({**HEAD, "criterion": "wanda"}, 9, {}),
    "movement between two optimizers": ({**HEAD, "criterion": "movement"}, 9, {"make": two, "half": True}),
    "a user's criterion": (lambda: replace(fst(warmup=3), criterion=Recent()), 9, {}),
    "asp_one_shot": ({"preset": "asp_one_shot", "prune_at": 4, "restart_lr": True}, 8, {"schedule": True}),
    "iterative": ({"preset": "iterative", "start": 2, "every": 6, "count": 2}, 5, {}),
    "iterative by density": ({"preset": "iterative", "start": 2, "every": 6, "by": "density"}, 5, {}),
    "slope": ({"preset": "slope", "adapter_rank": 2, "adapter_start": 4}, 8, {}),
    "s_ste": ({"preset": "s_ste", "warmup": 2, "mvue": True}, 6, {}),
    "step in its head": ({"preset": "step", "latest": 10, "earliest": 5}, 3, {}),
    "step": ({"preset": "step", "latest": 6, "earliest": 5}, 9, {}),
    "distillation": ({"preset": "dense_to_sparse_finetune", "distillation": 0.5}, 6, {}),
    "a dense layer": ({"preset": "recommended", "warmup": 2, "dense_budget": 0.6}, 6, {}),
    "dense tiles": ({"preset": "recommended", "warmup": 2, "dense_budget": 0.3, "dense_unit": "tiles"}, 6, {}),
}


def running(name: str) -> Run:
    method, steps, options = RUNS[name]
    options = dict(options)
    make, half, schedule = options.pop("make", adamw), options.pop("half", False), options.pop("schedule", False)
    model = mlp()
    optimizers = make(model)
    if schedule:
        options["lr_schedulers"] = [torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 0.01, TOTAL)]
    method = method() if callable(method) else method
    training = st.SparseTraining(model, optimizers, method, TOTAL, verbose=False, **options)
    run = Run(model, optimizers, training, 0)
    for step in range(steps):
        run.step = step
        run.go_on()
    if half:
        train(model, optimizers[0], 1, start=steps)
    run.step = steps
    return run


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor) and first.dtype == second.dtype
        return both and first.shape == second.shape and torch.equal(first.nan_to_num(), second.nan_to_num())
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def try_all(run: Run, damages: list[tuple[str, Callable[[], Any]]]) -> tuple[int, int]:
    """Load every damaged state; return how many were refused and how many were valid."""
    training, refused = run.training, 0
    start = copy.deepcopy((run.training.state_dict(), run.weights(), [one.state_dict() for one in run.optimizers]))
    before = run.snapshot()
    for what, make in damages:
        damaged = make()
        try:
            training.load_state_dict(damaged)
        except ValueError as error:
            message = str(error)
            assert re.fullmatch("[^\n]*(state|checkpoint)[^\n]*[.]", message), (what, message)
            assert len(message) < 500, (what, message)
            assert same(run.snapshot(), before), what
            refused += 1
            continue
        metrics = training.metrics(per_layer=True)
        assert metrics["violations"] == 0, what
        state = training.state_dict()
        training.load_state_dict(copy.deepcopy(state))
        assert same(training.state_dict(), state), what
        run.go_on()
        assert training.metrics()["violations"] == 0, what
        run.model.load_state_dict(start[1])
        for optimizer, saved in zip(run.optimizers, copy.deepcopy(start[2]), strict=True):
            optimizer.load_state_dict(saved)
        training.load_state_dict(copy.deepcopy(start[0]))
        assert same(run.snapshot(), before), f"the state does not come back after {what}"
    return refused, len(damages) - refused


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:resuming with another:UserWarning")
def test_a_damaged_state_is_refused_before_anything_is_changed_or_loads_to_a_valid_one(name: str) -> None:
    run = running(name)
    refused, valid = try_all(run, sampled(run.training.state_dict(), SAMPLE, seed=len(name)))
    assert refused > valid > 0


def damaged(state: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(state)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


DECAY, ADAPTERS = ("modifiers", "decay", "value"), ("modifiers", "adapters")
SENTENCES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("fst", lambda s: None, "state is None: it must be what SparseTraining.state_dict() returned."),
    ("fst", lambda s: [s], "state is a list of 1: it must be what SparseTraining.state_dict() returned."),
    ("fst", lambda s: damaged(s, "clock", value="9"), "state['clock'] is '9': it must be an int of at least 0; the "),
    ("fst", lambda s: damaged(s, "codes", "0", value=None), "['0'] is None: it must be a torch.int16 tensor (8, 4); "),
    ("fst", lambda s: damaged(s, "codes", value={"0": s["codes"]["2"], "2": s["codes"]["0"]}), "(8, 4); the"),
    ("fst", lambda s: damaged(s, "ages", "2", value=s["ages"]["2"][:4]), "it must be a torch.uint8 tensor (16, 32);"),
    ("fst", lambda s: damaged(s, "active", value=["0"]), "state['active'] has 1 layers but the sparse phase at step 9"),
    ("fst", lambda s: damaged(s, *DECAY, value=float("nan")), "state['modifiers']['decay']['value'] is nan: it must"),
    ("fst", lambda s: damaged(s, "flips", value={"0": 3}), "state['flips'] has no '2'; the checkpoint is damaged."),
    ("wanda", lambda s: damaged(s, "criterion", "criterion", value="wand"), "is of 'wand' but the method's is "),
    ("wanda", lambda s: damaged(s, "criterion", "running", "0", value=torch.zeros(8)), "it must be a torch.float32"),
    ("slope", lambda s: damaged(s, *ADAPTERS, "values", "0", value=[torch.zeros(2, 16)]), "it must be a list of 2;"),
    ("slope", lambda s: damaged(s, *ADAPTERS, "optimizer", "0", 1, "step", value=torch.tensor(2.0)), "a list of 2 st"),
    ("slope", lambda s: damaged(s, "backward_codes", "0", value=s["codes"]["0"]), "do not keep two of four along out_"),
    ("s_ste", lambda s: damaged(s, "modifiers", "soft_scales", value={}), "['soft_scales'] has no '0'; the checkpoint"),
    ("step", lambda s: damaged(s, "modifiers", "frozen_moments", value=None), "has no 'frozen_moments' but the method"),
    ("step", lambda s: damaged(s, "starts", value=[2, 0]), "it must be 2 steps that increase from 0, one for every"),
    ("iterative", lambda s: damaged(s, "dense", value=["0", "2"]), "state['dense'] holds every layer; the"),
    ("asp_one_shot", lambda s: damaged(s, "modifiers", "lr_restart", "rates", value=[[]]), "it must be a list of 1"),
    ("a user's criterion", lambda s: damaged(s, "criterion", "last", "0", value="x"), "by criterion 'recent' ("),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "sentence"), SENTENCES)
def test_the_key_the_value_and_what_is_allowed_are_named(
    name: str, change: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    run = running(name)
    before = run.snapshot()
    state = change(run.training.state_dict())
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run.training.load_state_dict(state)
    assert same(run.snapshot(), before)


@pytest.mark.parametrize("name", ["fst", "slope", "step"])
def test_a_constructor_that_refuses_a_state_leaves_model_and_optimizer_alone(name: str) -> None:
    state = running(name).training.state_dict()
    method, _, options = RUNS[name]
    model = mlp()
    optimizers = adamw(model)
    weights, groups = copy.deepcopy(model.state_dict()), [list(map(id, optimizers[0].param_groups[0]["params"]))]
    for path in (("clock",), ("codes", "2"), ("modifiers", "decay", "value"), ("active",)):
        with pytest.raises(ValueError, match=f"^state.*{path[0]}"):
            st.SparseTraining(model, optimizers, method, TOTAL, state=damaged(state, *path, value=None), **options)
        assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
        assert same(dict(model.state_dict()), dict(weights))
        assert [list(map(id, optimizers[0].param_groups[0]["params"]))] == groups
        assert not optimizers[0].state
        assert not optimizers[0]._optimizer_step_pre_hooks
        assert not optimizers[0]._optimizer_load_state_dict_pre_hooks


def test_keys_of_the_caller_stand_beside_the_state() -> None:
    run = running("fst")
    run.training.load_state_dict({**run.training.state_dict(), "trainer": object()})


def test_a_finished_run_takes_no_state() -> None:
    run = running("fst")
    state = run.training.state_dict()
    run.training.finish()
    with pytest.raises(ValueError, match=r"^training is finished: pass the state to a new SparseTraining"):
        run.training.load_state_dict(state)


@pytest.mark.filterwarnings("ignore:resuming with another method:UserWarning")
def test_a_hard_method_takes_no_soft_scales_from_a_soft_one() -> None:
    state = running("s_ste").training.state_dict()
    model = mlp()
    method = {"preset": "sr_ste", "warmup": 2}
    training = st.SparseTraining(model, adamw(model), method, TOTAL, state=state, verbose=False)
    assert training.phase == "sparse"
    for layer in training.masks.layers.values():
        assert layer.soft_scale is None


@pytest.mark.parametrize("name", ["fst", "s_ste", "slope"])
def test_damaged_pruned_values_are_refused_with_the_state_that_they_belong_to(name: str) -> None:
    run = running(name)
    layers = run.training.masks.layers
    pruned = st.detach_pruned(dict(run.model.state_dict()), layers)
    assert pruned
    before = run.snapshot()
    state, refused = {**run.training.state_dict(), "pruned_weights": pruned}, []
    for what, make in sampled(pruned, 40, seed=0):
        changed = {**state, "pruned_weights": make()}
        try:
            run.training.load_state_dict(changed)
        except ValueError as error:
            refused.append(str(error))
            assert same(run.snapshot(), before), what
        else:
            st.restore_pruned_(layers, state["codes"], changed["pruned_weights"])  # what the callbacks do then
            run.model.load_state_dict(before[1])
        with pytest.raises(ValueError, match="checkpoint"):
            st.restore_pruned_(layers, {"0": make()}, pruned)
        assert same(run.snapshot(), before), what
    assert all(re.fullmatch(r"(state|checkpoint)[^\n]*\.", message) for message in refused), refused
    assert len(refused) > 50


def test_masks_are_read_from_sound_checkpoints_alone() -> None:
    state = running("fst").training.state_dict()
    part = {key: state[key] for key in ("codes", "shapes", "transposed")}
    masks = st.read_masks({"sparsetrain": part})
    refused = []
    for what, make in mutations({"sparsetrain": part}):
        try:
            found = st.read_masks(make())
        except ValueError as error:
            refused.append(str(error))
        else:
            assert all(found[name].shape == masks[name].shape for name in found if name in masks), what
    assert all(re.fullmatch(r"checkpoint[^\n]*\.", message) for message in refused), refused
    assert len(refused) > 200


def test_masks_of_weights_that_are_stored_transposed_are_read_as_they_are_stored() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(32, 16), nn.Tanh(), nn.Linear(32, 16))
    training = st.SparseTraining(model, adamw(model), {"preset": "asp_one_shot", "prune_at": 0}, 4, verbose=False)
    masks = st.read_masks({"sparsetrain": training.state_dict()})
    assert masks["0"].shape == (16, 32)
    for name, mask in masks.items():
        assert torch.equal(model[int(name)].weight != 0, mask)
