"""The callback compares the first masked validation batch of a fit with plain masked weights."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning_runs import Regression, batches
from torch import Tensor, nn

from sparsetrain.callbacks import SparseTrainingCallback

METHOD = {"preset": "recommended", "warmup": 2}  # of 8 steps, so that masks come into force between two validations
SENTENCE = "validation does not compute what the masks say"


def fit(folder: Path, model: LightningModule, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 8, "val_check_interval": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
        "limit_val_batches": 2, "num_sanity_val_steps": 1,
    }  # fmt: skip
    trainer = Trainer(callbacks=[SparseTrainingCallback(METHOD)], **{**defaults, **options})
    trainer.fit(model, batches(), batches(16))
    return trainer


class Net(nn.Module):
    """Reads the weight of its second layer in evaluation."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.up, self.down, self.reads = nn.Linear(16, 32), nn.Linear(32, 16), reads
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).tanh()
        down = dict(self.named_parameters())["down.weight"]
        return self.drop(self.norm(F.linear(x, down) if self.reads and not self.training else self.down(x)))


class Module(Regression):
    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ModuleList([Net(reads)])[0])
        self.steps = 0

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.steps += 1
        super().validation_step(batch, batch_idx)


def module(reads: bool = False) -> Module:
    seed_everything(3, verbose=False)
    return Module(reads)


def test_a_weight_that_validation_reads_is_named_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module(reads=True))
    texts = [str(warning.message) for warning in caught if SENTENCE in str(warning.message)]
    assert len(texts) == 1
    assert "'net.0'" in texts[0]
    assert "'net.0.down'" in texts[0]
    assert "its parent reads its weight" in texts[0]


def test_the_check_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on what is computed, nor on what is logged, nor on counters."""

    def result(checked: bool) -> tuple[Module, Trainer]:
        made = module()
        with monkeypatch.context() as patch:
            if not checked:
                patch.setattr("sparsetrain.callbacks.validation_check.ValidationCheck.begin", lambda *args: None)
            return made, fit(tmp_path, made)

    (one, first), (other, second) = result(True), result(False)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert first.callback_metrics["val/loss"] == second.callback_metrics["val/loss"]
    assert one.steps == other.steps
    assert all("forward" not in vars(part) for part in one.modules())


class OneExtraRun(nn.Linear):
    """Counts what it computes, outside of the module."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        OneExtraRun.runs += 1
        return super().forward(x)


def test_it_costs_one_extra_run(tmp_path: Path) -> None:
    made = module()
    made.net.append(OneExtraRun(16, 16))
    OneExtraRun.runs = 0
    fit(tmp_path, made)
    assert OneExtraRun.runs == 8 + made.steps + 1  # training, validation, and the comparison


class Random(Module):
    """Is random in evaluation, which is no fault of the masks."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net[0].drop.train()
        super().validation_step(batch, batch_idx)


class Through(Module):
    """Validates through its own forward, which logs, and a cache that the model writes to."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(x)
        self.log("val/seen", float(len(cache)), reduce_fx="sum")
        return self.net(x)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.steps += 1
        cache: list[Tensor] = []
        self.log("val/loss", self(batch[0], cache).square().mean())
        assert len(cache) == 1


class Compiled(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager", fullgraph=True)


class CompiledInPlace(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager", fullgraph=True)


@pytest.mark.parametrize("kind", [Module, Random, Through, Compiled])
def test_no_false_alarm(kind: type[Module], tmp_path: Path) -> None:
    torch._dynamo.reset()
    seed_everything(3, verbose=False)
    made = kind()
    trainer = fit(tmp_path, made)  # warnings are errors
    if kind is Through:
        assert trainer.callback_metrics["val/seen"] == 2


def test_modules_compiled_in_place_are_compared(tmp_path: Path) -> None:
    torch._dynamo.reset()
    seed_everything(3, verbose=False)
    made = CompiledInPlace()
    next(part for part in made.modules() if isinstance(part, Net)).reads = True
    with pytest.warns(UserWarning, match=SENTENCE):
        fit(tmp_path, made)


def test_data_parallel(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=SENTENCE):
        fit(tmp_path, module(reads=True), strategy="ddp", devices=1)


def test_inputs_that_cannot_be_copied_are_said(tmp_path: Path) -> None:
    class Uncopied(list[Tensor]):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copy of me")

    class Odd(Through):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(batch[0], Uncopied())

    seed_everything(3, verbose=False)
    with pytest.warns(UserWarning, match="not compared with plain masked weights.*no copy of me"):
        fit(tmp_path, Odd())


def test_forwards_are_given_back_after_an_exception(tmp_path: Path) -> None:
    class Failing(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            if self.trainer.global_step > 4:
                raise KeyError("validation fails")
            super().validation_step(batch, batch_idx)

    seed_everything(3, verbose=False)
    made = Failing()
    with pytest.raises(KeyError, match="validation fails"):
        fit(tmp_path, made, val_check_interval=5)
    assert all("forward" not in vars(part) for part in made.modules())
    copy.deepcopy(made.net)
