"""The schedule's length and its clock mean the same steps, however the trainer counts; the tests count themselves."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning_runs import batches
from models import mlp
from torch import Tensor, nn

from sparsetrain.callbacks import SparseTrainingCallback

HALF = {"preset": "asp_one_shot", "prune_at": 0.5}


class Steps(LightningModule):
    """Takes the optimizer steps that a pattern names, one entry a batch: G owns one layer, D the other."""

    def __init__(self, pattern: list[str]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.pattern = pattern
        self.net = mlp()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for name in self.pattern[self.trainer.fit_loop.total_batch_idx % len(self.pattern)]:
            optimizer = self.optimizers()["GD".index(name)]
            optimizer.zero_grad()
            self.manual_backward((self.net(batch[0]) - batch[0].flip(1)).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]


class Plain(LightningModule):
    """Automatic optimization; the first steps are found to overflow, as a gradient scaler finds them."""

    def __init__(self, skipped: int = 0) -> None:
        super().__init__()
        self.skipped = skipped
        self.net = mlp()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[0].flip(1)).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.skipped:
            optimizer.found_inf = torch.tensor(float(self.trainer.global_step < self.skipped))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.skipped > 0)


class Watch(Callback):
    """Notes at which step of the clock each phase is first seen."""

    def __init__(self) -> None:
        self.began: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        (training,) = [entry.training for entry in trainer.callbacks if isinstance(entry, SparseTrainingCallback)]
        self.began.setdefault(training.phase, training.clock)


class Save(Callback):
    def __init__(self, path: Path, after: int, then_stop: bool = True) -> None:
        self.path, self.after, self.then_stop = path, after, then_stop

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.then_stop


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": -1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def count(pattern: list[str], owners: str, max_steps: int, max_batches: int) -> int:
    """Rounds in which every owner stepped, in the batches that Lightning runs."""
    rounds, steps, pending = 0, 0, set(owners)
    for batch in range(max_batches):
        for name in pattern[batch % len(pattern)]:
            steps += 1
            pending.discard(name)
            if not pending:
                rounds, pending = rounds + 1, set(owners)
        if steps >= max_steps:
            break
    return rounds


@pytest.mark.parametrize(
    ("owners", "end"), [("GD", "max_steps"), ("G", "max_steps"), ("D", "max_steps"), ("D", "max_epochs")]
)
@pytest.mark.parametrize(
    "pattern",
    [["GD"], ["G", "D"], ["DDDDDG"], ["D", "D", "D", "D", "D", "G"], ["", "", "GD"]],
    ids=["in every batch", "alternating", "five times in a batch", "five times in batches", "accumulating"],
)
def test_manual_optimization_prunes_half_way(pattern: list[str], owners: str, end: str, tmp_path: Path) -> None:
    steps, count_of_batches = (96, 10**6) if end == "max_steps" else (10**6, 36)
    limits = {"max_steps": steps} if end == "max_steps" else {"max_steps": -1, "max_epochs": 3}
    callback, watch = SparseTrainingCallback(HALF, targets=[{"G": "0", "D": "2"}[name] for name in owners]), Watch()
    trainer(tmp_path, callback, watch, **limits).fit(Steps(pattern), batches(4 * 12))  # 12 batches in an epoch
    rounds = count(pattern, owners, steps, count_of_batches)
    a_batch = max(len(batch) for batch in pattern) if owners == "D" else 1  # phases are seen between batches
    uneven = pattern == ["D", "D", "D", "D", "D", "G"] and owners == "D"  # as far apart as the pause makes them
    assert callback.training is not None
    assert callback.training.clock == rounds == callback.training.total_steps
    (_, start) = callback.training.timeline.starts
    assert abs(start - rounds / 2) <= 0.5 + uneven
    assert start <= watch.began["frozen"] <= start + a_batch


def test_steps_in_a_first_batch_do_not_end_a_dense_head(tmp_path: Path) -> None:
    callback, watch = SparseTrainingCallback({"preset": "recommended", "warmup": 0.15}, targets=["2"]), Watch()
    trainer(tmp_path, callback, watch, max_steps=-1, max_epochs=1).fit(Steps(["DDDDDG"]), batches(4 * 12))
    assert watch.began == {"dense": 5, "sparse": 10}  # at step 9 of 60
    assert callback.training is not None
    assert callback.training.timeline.starts == (0, 9)


def test_an_uneven_beginning_is_forgotten(tmp_path: Path) -> None:
    pattern = ["G", *["D"] * 5]  # rounds end in batches 2, 7, 13, 19, …: eight of them in 48
    callback = SparseTrainingCallback(HALF)
    trainer(tmp_path, callback, max_steps=48).fit(Steps(pattern), batches(4 * 48))
    assert callback.training is not None
    assert callback.training.clock == count(pattern, "GD", 48, 48) == callback.training.total_steps
    assert abs(callback.training.timeline.starts[1] - callback.training.clock / 2) <= 1


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("after", [1, 5])
def test_a_measured_run_resumes_bit_for_bit(after: int, first: bool, tmp_path: Path) -> None:
    def fit(*callbacks: Callback, seed: int = 0, **options: Any) -> tuple[Steps, SparseTrainingCallback]:
        sparse = SparseTrainingCallback({"preset": "dense_to_sparse_finetune", "refresh_every": 2, "decay": 0.1})
        order = [*callbacks, sparse] if first else [sparse, *callbacks]  # who saves before the clock is seen, or after
        fitter = trainer(tmp_path, *order, max_steps=24)
        torch.manual_seed(seed)
        module = Steps(["D", "", "G"])
        fitter.fit(module, batches(4 * 40), **options)
        return module, sparse

    path = tmp_path / "saved.ckpt"
    whole, sparse = fit(Save(path, after, then_stop=False))
    resumed, again = fit(seed=1, ckpt_path=path, weights_only=True)
    assert sparse.training is not None
    assert again.training is not None
    assert again.training.clock == sparse.training.clock == 12
    assert again.training.timeline == sparse.training.timeline
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("manual", [False, True])
def test_a_run_by_epochs_resumes_bit_for_bit_with_the_data_where_it_was(manual: bool, tmp_path: Path) -> None:
    def fit(*callbacks: Callback, seed: int = 0, **options: Any) -> LightningModule:
        fitter = trainer(tmp_path, SparseTrainingCallback(), *callbacks, max_epochs=3)
        torch.manual_seed(seed)
        module = Steps(["GD"]) if manual else Plain()
        fitter.fit(module, batches(32), **options)
        return module

    path = tmp_path / "saved.ckpt"
    whole = fit(Save(path, 5, then_stop=False))
    resumed = fit(seed=1, ckpt_path=path, weights_only=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_skipped_steps_shorten_the_run(tmp_path: Path) -> None:
    callback, watch = SparseTrainingCallback(HALF), Watch()
    trainer(tmp_path, callback, watch, max_steps=16).fit(Plain(skipped=4), batches())
    assert callback.training is not None
    assert (callback.training.clock, callback.training.total_steps, watch.began["frozen"]) == (12, 12, 6)


@pytest.mark.parametrize("by", ["steps", "epochs", "other data"])
def test_a_second_fit_has_the_length_of_what_it_trains(by: str, tmp_path: Path) -> None:
    limits = {"max_steps": 8} if by == "steps" else {"max_epochs": 1}
    callback, watch, module = SparseTrainingCallback(HALF), Watch(), Plain()
    fitter = trainer(tmp_path, callback, watch, **limits)
    fitter.fit(module, batches(32))  # 8 batches
    watch.began.clear()
    if by == "steps":
        fitter.fit_loop.epoch_loop.max_steps = 8 + 14
    else:
        fitter.fit_loop.max_epochs = 3
    fitter.fit(module, batches(28 if by == "other data" else 32))
    steps = {"steps": 14, "epochs": 16, "other data": 14}[by]
    assert callback.training is not None
    assert (callback.training.clock, callback.training.total_steps) == (steps, steps)
    assert watch.began["frozen"] == steps // 2


@pytest.mark.parametrize("after", [5, 8])  # in an epoch, and at its end
@pytest.mark.parametrize("manual", [False, True])
def test_a_fit_from_a_dense_checkpoint_has_the_length_of_what_is_left(manual: bool, after: int, tmp_path: Path) -> None:
    def module() -> LightningModule:
        return Steps(["GD"]) if manual else Plain()

    trainer(tmp_path, Save(tmp_path / "dense.ckpt", after), max_epochs=3).fit(module(), batches(32))
    callback, watch = SparseTrainingCallback(HALF), Watch()
    fitter = trainer(tmp_path, callback, watch, max_epochs=3)
    with pytest.warns(UserWarning, match="starts at step 0"):
        fitter.fit(module(), batches(32), ckpt_path=tmp_path / "dense.ckpt", weights_only=True)
    assert callback.training is not None
    assert (callback.training.clock, callback.training.total_steps) == (24 - after, 24 - after)
    assert watch.began["frozen"] == round((24 - after) / 2)


@pytest.mark.parametrize("manual", [False, True])
def test_a_raised_end_moves_what_has_not_begun(manual: bool, tmp_path: Path) -> None:
    def fit(steps: int, *callbacks: Callback, **options: Any) -> SparseTrainingCallback:
        sparse = SparseTrainingCallback({"preset": "recommended", "warmup": 0.15, "freeze": 0.25, "dense_tail": 0.25})
        fitter = trainer(tmp_path, sparse, *callbacks, max_steps=steps * (2 if manual else 1))
        fitter.fit(Steps(["GD"]) if manual else Plain(), batches(4 * 40), **options)
        return sparse

    path = tmp_path / "ten.ckpt"
    fit(20, Save(path, 8, then_stop=False))
    with pytest.warns(UserWarning, match="resuming with another end of the trainer"):
        callback = fit(40, ckpt_path=path, weights_only=True)
    assert callback.training is not None
    # the head of 3 steps is over; what is left begins at 50 % and 75 % of 40
    assert (callback.training.timeline.starts, callback.training.total_steps) == ((0, 3, 20, 30), 40)


def test_a_checkpoint_of_a_run_that_is_over_changes_nothing(tmp_path: Path) -> None:
    fitter = trainer(tmp_path, SparseTrainingCallback(HALF), max_steps=6)
    fitter.fit(before := Plain(), batches())
    fitter.save_checkpoint(tmp_path / "last.ckpt")
    callback = SparseTrainingCallback(HALF)
    trainer(tmp_path, callback, max_steps=6).fit(
        after := Plain(), batches(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("limits", [{"max_steps": 0}, {"max_steps": 4, "limit_train_batches": 0}])
def test_a_fit_without_a_step_leaves_the_model_alone(limits: dict[str, Any], tmp_path: Path) -> None:
    callback, module = SparseTrainingCallback({"preset": "asp_one_shot", "prune_at": 0}), Plain()
    with pytest.warns(UserWarning, match="this fit trains no step, so the model stays as it is"):
        trainer(tmp_path, callback, **limits).fit(module, batches())
    assert callback.training is None
    assert type(module.net[0]) is nn.Linear
    assert bool((module.net[0].weight != 0).all())


def test_accumulation_that_changes_is_followed(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    callback, watch = SparseTrainingCallback(HALF), Watch()
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    trainer(tmp_path, scheduler, callback, watch, max_epochs=3).fit(Plain(), batches(4 * 10))
    assert callback.training is not None
    steps = 10 + 2 * math.ceil(10 / 3)
    assert (callback.training.clock, callback.training.total_steps) == (steps, steps)


@pytest.mark.parametrize(
    "damage", [{"origin": [1, 2]}, {"origin": [0, 0, "x"]}, {"origin": 3}, {"seen": "x"}, {"seen": 1.5}]
)
def test_a_damaged_length_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    trainer(tmp_path, SparseTrainingCallback(), Save(path, 3, then_stop=False), max_steps=6).fit(Plain(), batches())
    saved = torch.load(path, weights_only=True)
    saved["sparsetrain"]["run_length"].update(damage)
    torch.save(saved, path)
    module = Plain()
    with pytest.raises(ValueError, match=r"checkpoint's run_length has origin .* the checkpoint is damaged\.$"):
        trainer(tmp_path, SparseTrainingCallback(), max_steps=6).fit(
            module, batches(), ckpt_path=path, weights_only=True
        )
    assert type(module.net[0]) is nn.Linear
