import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_runs import Regression, batches
from models import mlp
from torch import nn

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import asp_one_shot, fst

MOVING = {"preset": "fst", "refresh_every": 4, "decay": 0.01, "dense_tail": 0, "warmup": 2}


def trainer(folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def model() -> Regression:
    seed_everything(3, verbose=False)
    return Regression()


class Recorder(Logger):
    """A logger that is neither W&B nor TensorBoard."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.parameters: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.parameters.update(params)


def test_the_callback_gives_the_same_weights_as_the_engine_in_a_plain_loop(tmp_path: Path) -> None:
    lightning, plain = model(), model()
    callback = SparseTrainingCallback(MOVING, targets=[r"net\..*"])
    trainer(tmp_path, 10, callback, gradient_clip_val=0.1).fit(lightning, batches())
    optimizer = plain.configure_optimizers()
    engine = st.SparseTraining(plain, optimizer, MOVING, 10, targets=[r"net\..*"], verbose=False)
    for _, (x,) in zip(range(10), batches(), strict=False):
        optimizer.zero_grad()
        ((plain.net(x) - x.flip(1)).square().mean() + plain.extra(x).square().mean()).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    engine.finish()
    for a, b in zip(lightning.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert callback.training is not None
    assert callback.training.clock == 10


@pytest.mark.parametrize(
    "method", [MOVING, asp_one_shot(prune_at=3), fst(refresh_every=5, dense_tail=3)], ids=["fst", "asp", "tail"]
)
@pytest.mark.parametrize("stop", [3, 6])
def test_resuming_inside_a_mask_period_equals_the_uninterrupted_run(tmp_path: Path, method: Any, stop: int) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "enable_checkpointing": True}

    def run(steps: int, checkpoint: str | None = None) -> tuple[Regression, dict[str, Any]]:
        module = model()
        if checkpoint:
            with torch.no_grad():
                module.net[0].weight.add_(1)
        saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop, save_top_k=-1)
        callback = SparseTrainingCallback(method, targets=[r"net\..*"], total_steps=12, track_age=True)
        fitter = trainer(tmp_path, steps, callback, saver, **options)
        fitter.fit(module, batches(96, 4), ckpt_path=checkpoint, **({"weights_only": True} if checkpoint else {}))
        fitter.save_checkpoint(tmp_path / "final.ckpt")
        final = torch.load(tmp_path / "final.ckpt", weights_only=True)
        return module, final

    whole, final = run(12)
    (path,) = (tmp_path / "saved").glob(f"*step={stop}.ckpt")
    resumed, resumed_final = run(12, str(path))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = final["optimizer_states"][0]["state"], resumed_final["optimizer_states"][0]["state"]
    assert all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])
    for key in ("codes", "ages", "pruned_weights"):
        a, b = final["sparsetrain"][key], resumed_final["sparsetrain"][key]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert final["sparsetrain"]["clock"] == resumed_final["sparsetrain"]["clock"] == 12
    assert final["sparsetrain"]["flips"] == resumed_final["sparsetrain"]["flips"]


def test_a_checkpoint_saved_after_the_fit_is_sparse_and_still_resumes_exactly(tmp_path: Path) -> None:
    whole = model()
    trainer(tmp_path, 10, SparseTrainingCallback(MOVING, total_steps=10)).fit(whole, batches())
    first = model()
    fitter = trainer(tmp_path, 5, SparseTrainingCallback(MOVING, total_steps=10))
    fitter.fit(first, batches())
    assert (first.net[0].weight == 0).float().mean() == 0.5
    fitter.save_checkpoint(tmp_path / "five.ckpt")
    loaded = Regression.load_from_checkpoint(tmp_path / "five.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))
    second = model()
    again = trainer(tmp_path, 10, SparseTrainingCallback(MOVING, total_steps=10))
    again.fit(second, batches(), ckpt_path=str(tmp_path / "five.ckpt"), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_checkpoints_load_without_the_callback_and_compute_what_was_evaluated(tmp_path: Path) -> None:
    class Evaluate(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "six.ckpt")
                with torch.no_grad():
                    self.output = pl_module.net(torch.ones(2, 16))

    probe = Evaluate()
    module = model()
    trainer(tmp_path, 8, SparseTrainingCallback(MOVING), probe).fit(module, batches())
    loaded = Regression.load_from_checkpoint(tmp_path / "six.ckpt")
    torch.testing.assert_close(loaded.net(torch.ones(2, 16)), probe.output)
    assert (loaded.net[0].weight == 0).float().mean() == 0.5
    saved = torch.load(tmp_path / "six.ckpt", weights_only=True)
    assert sorted(saved["state_dict"]) == sorted(Regression().state_dict())
    masks = st.read_masks(saved)
    assert st.is_transposable(masks["net.0"])
    assert torch.equal(masks["net.0"], loaded.net[0].weight != 0)


def test_scalars_reach_every_logger_and_the_progress_bar(tmp_path: Path) -> None:
    recorder, bar = Recorder(), TQDMProgressBar()
    callback = SparseTrainingCallback(MOVING, targets=[r"net\..*"], per_layer_metrics=True)
    fitter = trainer(
        tmp_path,
        10,
        callback,
        bar,
        logger=[recorder, CSVLogger(tmp_path)],
        log_every_n_steps=1,
        enable_progress_bar=True,
    )
    fitter.fit(model(), batches())
    last = {key: value for _, row in recorder.rows for key, value in row.items()}
    for key in ("flip_rate", "kept_fraction", "approximation_error", "kept_magnitude_mean", "pruned_magnitude_mean",
                "pruned_count", "total_count", "violations", "nonfinite_count",
                "sparse_flops_share", "refresh_ms"):  # fmt: skip
        assert f"sparsity/{key}" in last
        assert f"sparsity/{key}" in fitter.callback_metrics
    assert last["sparsity/violations"] == 0
    assert last["sparsity/layer/net.0/kept_fraction"] > 0.5
    assert "sparsity/flip_rate" in fitter.progress_bar_metrics
    assert recorder.parameters["sparsity"]["method"]["name"] == "fst"
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "sparsity/flip_rate" in header


def test_scalars_reach_an_offline_wandb_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    trainer(tmp_path, 6, SparseTrainingCallback(MOVING), logger=logger, log_every_n_steps=1).fit(model(), batches())
    summary = dict(logger.experiment.summary)
    assert summary["sparsity/violations"] == 0
    assert 0 <= summary["sparsity/flip_rate"] <= 1
    assert logger.experiment.config["sparsity"]["method"]["pattern"] == "transposable"
    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_accumulation_and_clipping_count_optimizer_steps(tmp_path: Path) -> None:
    callback = SparseTrainingCallback(MOVING)
    fitter = trainer(tmp_path, 5, callback, accumulate_grad_batches=3, gradient_clip_val=1.0)
    fitter.fit(model(), batches())
    assert callback.training is not None
    assert callback.training.clock == fitter.global_step == 5


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(tmp_path: Path, precision: str) -> None:
    method = {**MOVING, "decay": 0.0} if precision == "bf16-true" else MOVING
    module = model()
    trainer(tmp_path, 6, SparseTrainingCallback(method), precision=precision).fit(module, batches())
    assert (module.net[0].weight == 0).float().mean() == 0.5


def test_models_that_are_built_in_configure_model(tmp_path: Path) -> None:
    class Late(Regression):
        def __init__(self) -> None:
            super().__init__()
            del self.net

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = mlp()

    module = Late()
    trainer(tmp_path, 6, SparseTrainingCallback(MOVING)).fit(module, batches())
    assert (module.net[0].weight == 0).float().mean() == 0.5


def test_sanity_check_validation_and_test_see_the_mask_and_move_nothing(tmp_path: Path) -> None:
    callback = SparseTrainingCallback(MOVING)
    fitter = trainer(tmp_path, 6, callback, val_check_interval=1, check_val_every_n_epoch=None)
    module = model()
    fitter.fit(module, batches(), batches())
    assert callback.training is not None
    assert callback.training.clock == 6
    fitter.validate(module, batches(), verbose=False)


def test_a_second_fit_with_the_same_callback_starts_again(tmp_path: Path) -> None:
    callback, module = SparseTrainingCallback(MOVING), model()
    trainer(tmp_path, 4, callback).fit(module, batches())
    trainer(tmp_path, 6, callback).fit(module, batches())
    assert callback.training is not None
    assert callback.training.clock == 6
    assert type(module.net[0]) is nn.Linear


def test_after_an_interruption_the_next_fit_starts_from_the_dense_masters(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("crash")

    callback, module = SparseTrainingCallback(MOVING), model()
    with pytest.raises(RuntimeError, match="crash"):
        trainer(tmp_path, 8, callback, Crash()).fit(module, batches())
    trainer(tmp_path, 5, callback).fit(module, batches())
    assert type(module.net[0]) is nn.Linear


def test_the_hooks_that_other_callbacks_see_are_unchanged(tmp_path: Path) -> None:
    class Spy(Callback):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_") or name in ("setup", "teardown", "state_dict", "load_state_dict"):
                object.__getattribute__(self, "seen").append(name)
            return object.__getattribute__(self, name)

    def hooks(*callbacks: Callback) -> list[str]:
        spy = Spy()
        trainer(tmp_path, 4, *callbacks, spy).fit(model(), batches(), batches())
        return spy.seen

    assert hooks(SparseTrainingCallback(MOVING)) == hooks()


@pytest.mark.parametrize("buffer", [False, True])
def test_exponential_moving_averages_work(tmp_path: Path, buffer: bool) -> None:
    module = model()
    if buffer:
        module.register_buffer("scale", torch.full((1,), 3.0))
    trainer(tmp_path, 6, SparseTrainingCallback(MOVING), EMAWeightAveraging(decay=0.5)).fit(
        module, batches(), batches()
    )
    assert (module.net[0].weight == 0).float().mean() == 0.5
    assert not buffer or module.scale.item() == 3.0


def test_a_checkpoint_of_another_model_is_refused_before_any_weight_is_copied(tmp_path: Path) -> None:
    other = Regression(hidden=8)
    fitter = trainer(tmp_path, 2, SparseTrainingCallback(MOVING))
    fitter.fit(other, batches())
    fitter.save_checkpoint(tmp_path / "other.ckpt")
    module = model()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"another model: 'net.0.weight' is \(8, 16\) there and \(32, 16\) here"):
        trainer(tmp_path, 4, SparseTrainingCallback(MOVING)).fit(
            module, batches(), ckpt_path=tmp_path / "other.ckpt", weights_only=True
        )
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
    assert type(module.net[0]) is nn.Linear


def test_a_deeper_model_is_refused_but_modules_may_rename_keys(tmp_path: Path) -> None:
    class Deeper(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(16, 16)

    class Renaming(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_load_state_dict_pre_hook(self._rename)

        @staticmethod
        def _rename(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
            for name in [name for name in state_dict if name.startswith("old_")]:
                state_dict[name.removeprefix("old_")] = state_dict.pop(name)

    fitter = trainer(tmp_path, 2, SparseTrainingCallback(MOVING, targets=[r"net\..*"]))
    fitter.fit(Deeper(), batches())
    fitter.save_checkpoint(tmp_path / "deeper.ckpt")
    module = model()
    before = copy.deepcopy(module.state_dict())
    callback = SparseTrainingCallback(MOVING, targets=[r"net\..*"])
    with pytest.raises(ValueError, match=r"another model: 'more\.bias' is only in the checkpoint"):
        trainer(tmp_path, 4, callback).fit(module, batches(), ckpt_path=tmp_path / "deeper.ckpt", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))

    fitter = trainer(tmp_path, 2, SparseTrainingCallback(MOVING, targets=[r"net\..*"]))
    fitter.fit(model(), batches())
    fitter.save_checkpoint(tmp_path / "old.ckpt")
    saved = torch.load(tmp_path / "old.ckpt", weights_only=True)
    saved["state_dict"] = {f"old_{k}" if k.startswith("net.0") else k: v for k, v in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "old.ckpt")
    trainer(tmp_path, 4, callback).fit(Renaming(), batches(), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert callback.training is not None
    assert callback.training.clock == 4


def test_a_checkpoint_without_state_warns_and_starts_at_step_zero(tmp_path: Path) -> None:
    fitter = trainer(tmp_path, 2)
    fitter.fit(model(), batches())
    fitter.save_checkpoint(tmp_path / "dense.ckpt")
    callback = SparseTrainingCallback(MOVING)
    with pytest.warns(UserWarning, match="starts at step 0"):
        trainer(tmp_path, 6, callback).fit(model(), batches(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True)
    assert callback.training is not None
    assert callback.training.clock == 4


def test_fractions_outside_of_the_schedule_take_the_length_from_the_trainer(tmp_path: Path) -> None:
    method = {"preset": "dense_to_sparse_finetune", "freeze_at": 4, "decay_ramp": 0.5}
    callback = SparseTrainingCallback(method)
    trainer(tmp_path, 6, callback).fit(Regression(), batches())
    assert callback.training is not None
    assert callback.training.total_steps == 6


def test_misuse_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'fts'"):
        SparseTrainingCallback("fts")
    with pytest.raises(MisconfigurationException, match="more than one SparseTrainingCallback"):
        trainer(tmp_path, 2, SparseTrainingCallback(), SparseTrainingCallback()).fit(model(), batches())
    endless = trainer(tmp_path, -1, SparseTrainingCallback(fst(dense_tail=0.5)))
    with pytest.raises(MisconfigurationException, match="max_steps=-1"):
        endless.fit(model(), batches())
    module = model()
    with pytest.raises(ValueError, match="'nowhere' matches no layer"):
        trainer(tmp_path, 2, SparseTrainingCallback(targets="nowhere")).fit(module, batches())
    assert type(module.net[0]) is nn.Linear


def test_the_learning_rate_schedule_restarts_with_the_retraining(tmp_path: Path) -> None:
    class Scheduled(Regression):
        rates: list[float]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            self.rates = []
            optimizer.register_step_post_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"] / 1e-2))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = Scheduled()
    trainer(tmp_path, 6, SparseTrainingCallback(asp_one_shot(prune_at=3, restart_lr=True))).fit(module, batches())
    assert module.rates == [1, 0.5, 0.25, 1, 0.5, 0.25]


def test_a_subclass_may_have_attributes_of_its_own_first() -> None:
    class Named(SparseTrainingCallback):
        def __init__(self) -> None:
            self.note = "mine"
            super().__init__(targets="mlp")

    assert (Named().note, Named().targets) == ("mine", "mlp")
