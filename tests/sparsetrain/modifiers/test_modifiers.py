"""The interface of what a method switches on: the example of CONTRIBUTING.md, and the order of the calls."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import mlp, train
from torch import nn
from torch.optim import Optimizer

import sparsetrain as st
from sparsetrain.modifiers import registry
from sparsetrain.modifiers.base import Entry, Modifier, Run, Setup, Step, Updated
from sparsetrain.types import PhaseKind

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Clipped(st.Method):
    """A method with the field of the example."""

    clip_weights: float = 0.0


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> type[Modifier]:
    (block,) = re.findall(r"  ```python\n(.*?)  ```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
    names: dict[str, Any] = {"__name__": "weight_clip"}
    exec(compile(re.sub(r"(?m)^  ", "", block), "CONTRIBUTING.md", "exec"), names)
    found: type[Modifier] = names["WeightClip"]
    monkeypatch.setattr(registry, "MODIFIERS", (*registry.MODIFIERS, found))
    return found


def started(limit: float, **options: Any) -> tuple[nn.Module, Optimizer, st.SparseTraining]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = Clipped(schedule=st.dense_prune_retrain(3), clip_weights=limit)
    return model, optimizer, st.SparseTraining(model, optimizer, method, 12, verbose=False, **options)


def test_the_example_of_the_contributors_guide_does_what_it_says(example: type[Modifier]) -> None:
    model, optimizer, training = started(0.1)
    train(model, optimizer, 6)
    assert training.metrics()["weight_limit"] == pytest.approx(0.1 * 0.99**6)
    largest = max(float(layer.weight.detach().abs().max()) for layer in (model[0], model[2]))
    assert 0.05 < largest <= 0.1 * 0.99**5
    assert training.metrics()["violations"] == 0
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, 4, start=6)
    again, other, resumed = started(0.1)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, other, 4, start=6)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    damaged = copy.deepcopy(saved[2])
    damaged["modifiers"]["weight_clip"] = -1.0
    with pytest.raises(ValueError, match=r"^state\['modifiers'\]\['weight_clip'\] is -1\.0: .* damaged\.$"):
        resumed.load_state_dict(damaged)


def test_a_method_that_does_not_switch_it_on_has_none_of_it(example: type[Modifier]) -> None:
    _, _, training = started(0.0)
    assert "weight_limit" not in training.metrics()
    assert "weight_clip" not in training.state_dict()["modifiers"]


class Witness(Modifier):
    """Notes what it is called for."""

    name = "witness"
    calls: ClassVar[list[str]] = []

    @classmethod
    def check(cls, setup: Setup) -> None:
        cls.calls.append("check")

    @classmethod
    def of(cls, run: Run, setup: Setup) -> "Witness":
        cls.calls.append("of")
        return cls()

    def attach(self) -> None:
        self.calls.append("attach")

    def before_step(self, run: Run, step: Step) -> None:
        self.calls.append(f"before_step {run.clock}")

    def after_update(self, optimizer: Optimizer) -> Updated:
        self.calls.append("after_update")
        return Updated()

    def after_step(self, run: Run) -> None:
        self.calls.append(f"after_step {run.clock} {run.phase}")

    def leave_phase(self, run: Run, upcoming: PhaseKind, regroups: bool) -> None:
        self.calls.append(f"leave_phase for {upcoming}")

    def enter_phase(self, run: Run, entry: Entry) -> None:
        self.calls.append(f"enter_phase {run.phase} {sorted(entry.fresh)}{' resumed' * entry.resumed}")

    def finish(self, run: Run) -> bool:
        self.calls.append("finish")
        return False

    def detach(self) -> None:
        self.calls.append("detach")


def test_calls_come_in_the_order_that_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MODIFIERS", (Witness,))
    monkeypatch.setattr(Witness, "calls", [])
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = st.SparseTraining(model, optimizer, {"preset": "asp_one_shot", "prune_at": 1}, 4, verbose=False)
    step = ["before_step 0", "after_update", "after_step 1 dense"]
    entered = ["leave_phase for frozen", "enter_phase frozen ['0', '2']"]
    train(model, optimizer, 1)
    assert Witness.calls == [
        "check", "of", "attach", "leave_phase for dense", "enter_phase dense []", *step, *entered
    ]  # fmt: skip
    Witness.calls.clear()
    training.load_state_dict(training.state_dict())
    training.retime(5)
    assert Witness.calls == ["enter_phase frozen [] resumed"] * 2
    Witness.calls.clear()
    training.finish()
    assert Witness.calls == ["finish", "detach"]


def test_what_is_hung_on_is_taken_off_when_a_later_one_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Modifier):
        name = "broken"

        @classmethod
        def of(cls, run: Run, setup: Setup) -> "Broken":
            raise ValueError("the layer is too small: take another.")

    monkeypatch.setattr(registry, "MODIFIERS", (Witness, Broken))
    monkeypatch.setattr(Witness, "calls", [])
    model = mlp()
    with pytest.raises(ValueError, match="the layer is too small"):
        st.SparseTraining(model, torch.optim.SGD(model.parameters(), lr=0.1), "fst", 40, verbose=False)
    assert Witness.calls == ["check", "of", "attach", "detach"]
    assert type(model[0]) is nn.Linear


def test_every_part_of_a_checkpoint_has_a_name_of_its_own() -> None:
    names = [kind.name for kind in registry.MODIFIERS]
    assert len({*names}) == len(names)
