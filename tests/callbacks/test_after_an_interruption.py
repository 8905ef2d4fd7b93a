"""A fit that was interrupted leaves nothing behind that hinders the next one, whoever trains then."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_runs import Regression, batches
from models import mlp, train
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback

METHOD = {"preset": "recommended", "warmup": 2, "decay": 0.01, "refresh_every": 3}
DISTILS = {"preset": "dense_to_sparse_finetune", "distillation": 0.5, "refresh_every": 3}


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 8, "max_epochs": -1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def model() -> Regression:
    torch.manual_seed(3)
    return Regression()


class Module(LightningModule):
    """Its ``forward`` is what a teacher needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(seed=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0].flip(1)).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Raise(Callback):
    def __init__(self, hook: str, error: BaseException) -> None:
        self.optimizer: Any = None

        def fail(trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step >= 4 or hook in ("setup", "on_fit_start"):
                self.optimizer = next(iter(trainer.optimizers), None)
                raise error

        setattr(self, hook, fail)


@pytest.mark.parametrize("first", [METHOD, DISTILS], ids=["masks", "teacher"])
@pytest.mark.parametrize(
    ("hook", "error", "raised"),
    [
        ("on_train_batch_end", RuntimeError("crash"), RuntimeError),
        ("on_train_batch_end", KeyboardInterrupt(), SystemExit),
        ("on_validation_batch_end", RuntimeError("crash"), RuntimeError),
        ("on_fit_start", RuntimeError("crash"), RuntimeError),
        ("setup", RuntimeError("crash"), RuntimeError),
    ],
)
def test_a_new_callback_goes_on_from_the_dense_masters(
    hook: str, error: BaseException, raised: type[BaseException], first: Any, tmp_path: Path
) -> None:
    module, crash = Module(), Raise(hook, error)
    interrupted = trainer(tmp_path, SparseTrainingCallback(first), crash, val_check_interval=2,
                          check_val_every_n_epoch=None)  # fmt: skip
    with pytest.raises(raised):
        interrupted.fit(module, batches(), batches(8))
    masters = {name: value.clone() for name, value in module.state_dict().items()}
    assert all(bool((value != 0).all()) for name, value in masters.items() if name.endswith("weight"))
    if crash.optimizer is not None:
        kept = [*crash.optimizer._optimizer_step_pre_hooks, *crash.optimizer._optimizer_step_post_hooks]
        assert bool(kept) == (hook != "setup")

    callback = SparseTrainingCallback(METHOD)
    trainer(tmp_path, callback).fit(module, batches())
    assert callback.training is not None
    assert callback.training.clock == 8

    fresh = Module()
    fresh.load_state_dict(masters)
    trainer(tmp_path, SparseTrainingCallback(METHOD)).fit(fresh, batches())
    for a, b in zip(module.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [type(layer) for layer in module.net] == [nn.Linear, nn.Tanh, nn.Linear]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert "training_step" not in vars(module)
    if crash.optimizer is not None:
        assert not crash.optimizer._optimizer_step_pre_hooks
        assert not crash.optimizer._optimizer_step_post_hooks


def test_a_run_of_ones_own_loop_is_taken_over_by_a_callback(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.net.parameters())
    own = st.SparseTraining(module.net, optimizer, METHOD, verbose=False)
    train(module.net, optimizer, 5)
    callback = SparseTrainingCallback(METHOD)
    trainer(tmp_path, callback).fit(module, batches())
    assert own.finished
    assert callback.training is not None
    assert callback.training.clock == 8


def test_layers_whose_run_is_gone_are_taken_over_and_those_of_sparsify_are_not(tmp_path: Path) -> None:
    module = model()
    optimizer = torch.optim.AdamW(module.parameters())
    st.SparseTraining(module, optimizer, METHOD, targets=["net.0"], verbose=False)
    train(module.net, optimizer, 4)
    copied = copy.deepcopy(module)  # its layers are sparse, but no run knows them
    callback = SparseTrainingCallback(METHOD)
    trainer(tmp_path, callback).fit(copied, batches())
    assert (copied.net[0].weight == 0).float().mean() == 0.5

    by_hand = model()
    st.sparsify_(by_hand, targets=["net.0", "net.2"], verbose=False)
    with pytest.raises(ValueError, match=r"already sparse: .*export_dense_\(model, zeros=False\)"):
        trainer(tmp_path, SparseTrainingCallback(METHOD)).fit(by_hand, batches())
    assert type(by_hand.net[0]).__name__ == "SparseLinear"


def test_two_runs_of_ones_own_on_a_model_are_told_what_to_do() -> None:
    module = mlp()
    optimizer = torch.optim.AdamW(module.parameters())
    first = st.SparseTraining(module, optimizer, METHOD, targets=["0"], verbose=False)
    train(module, optimizer, 3)
    with pytest.raises(ValueError, match=r"'0' is trained by another SparseTraining, at step 3: call its finish\(\)"):
        st.SparseTraining(module, optimizer, METHOD, verbose=False)
    with pytest.raises(ValueError, match=r"already sparse: another SparseTraining trains it, so call its finish\(\)"):
        st.SparseTraining(module, optimizer, METHOD, targets=["0"], verbose=False)
    second = st.SparseTraining(module, optimizer, METHOD, exclude=["0"], verbose=False)
    second.finish(zeros=False)
    first.finish(zeros=False)
    st.SparseTraining(module, optimizer, METHOD, verbose=False).finish()


@pytest.mark.parametrize("strict", [None, True, False])
def test_strict_loading_is_respected_on_resume(strict: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "four.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(path)

    trainer(tmp_path, SparseTrainingCallback(METHOD), Save()).fit(whole := model(), batches())
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["other.weight"] = torch.zeros(3)
    del saved["state_dict"]["extra.bias"]
    torch.save(saved, path)

    module = model()
    if strict is not None:
        module.strict_loading = strict
    fitter = trainer(tmp_path, SparseTrainingCallback(METHOD))
    if strict is not False:
        with pytest.raises(ValueError, match=r"another model: '(extra\.bias|other\.weight)' is only in the"):
            fitter.fit(module, batches(), ckpt_path=path, weights_only=True)
        return
    fitter.fit(module, batches(), ckpt_path=path, weights_only=True)
    for a, b in zip(module.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(a, b)
