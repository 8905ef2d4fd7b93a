import copy
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import batches
from models import mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback

METHOD = {
    "preset": "dense_to_sparse_finetune", "decay": 0.01, "decay_ramp": 4, "refresh_every": 2, "freeze_at": 4,
    "distillation": 0.67,
}  # fmt: skip


class Classifier(LightningModule):
    """Its ``forward`` gives logits; the label of an example is where its input is largest."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kind = kind
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.kind == "some" and batch_idx % 2:
            return None
        loss = F.cross_entropy(self(batch[0]), batch[0].argmax(1))
        self.log("train/loss", loss)
        return {"loss": loss, "more": 1} if self.kind == "mapping" else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[0].argmax(1)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": False, "devices": 1,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def module(kind: str = "tensor", own: type[Classifier] = Classifier) -> Classifier:
    seed_everything(3, verbose=False)
    return own(kind)


def plain_loop(steps: int, **options: Any) -> Classifier:
    model = module()
    optimizer = model.configure_optimizers()
    training = st.SparseTraining(model, optimizer, METHOD, 12, verbose=False, **options)
    for _, (x,) in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        training.distilled(F.cross_entropy(model(x), x.argmax(1))).backward()
        optimizer.step()
    training.finish()
    return model


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["tensor", "mapping"])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_every_strategy_gives_the_weights_of_a_plain_loop(tmp_path: Path, kind: str, strategy: str) -> None:
    model, callback = module(kind), SparseTrainingCallback(METHOD)
    fitter = trainer(tmp_path, 12, callback, strategy=strategy)
    fitter.fit(model, batches())
    assert same(model, plain_loop(12))
    assert "training_step" not in vars(model)
    assert fitter.callback_metrics["sparsity/distillation"] > 0
    assert not model._forward_hooks


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_the_loss_goes_down_and_a_submodule_may_give_the_logits(tmp_path: Path, strategy: str) -> None:
    class Direct(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[0].argmax(1))

    model, teacher = module(own=Direct), module()
    before = torch.stack([F.cross_entropy(model.net(x), x.argmax(1)).detach() for (x,) in batches()]).mean()
    method = {**METHOD, "distillation": 0.3}
    trainer(tmp_path, 64, SparseTrainingCallback(method, logits_from="net"), strategy=strategy).fit(model, batches())
    after = torch.stack([F.cross_entropy(model.net(x), x.argmax(1)).detach() for (x,) in batches()]).mean()
    assert after < 0.8 * before
    assert not same(model, teacher)
    with pytest.raises(RuntimeError, match=r"^no forward of the model in training mode .* in logits_from\.$"):
        trainer(tmp_path, 4, SparseTrainingCallback(METHOD), strategy=strategy).fit(module(own=Direct), batches())


def test_a_given_teacher_is_passed_on(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, 6, SparseTrainingCallback(METHOD, teacher=mlp(seed=5), total_steps=6)).fit(model, batches())
    assert same(model, plain_loop(6, teacher=mlp(seed=5)))
    assert not same(model, plain_loop(6))


def test_resuming_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    def run(model: Classifier, checkpoint: str | None = None) -> Classifier:
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
        fitter = trainer(
            tmp_path, 12, SparseTrainingCallback(METHOD), saver, enable_checkpointing=True, accumulate_grad_batches=2
        )
        fitter.fit(model, batches(96, 4), ckpt_path=checkpoint, **({"weights_only": True} if checkpoint else {}))
        return model

    whole = run(module())
    for stop in (3, 6, 9):
        (path,) = tmp_path.glob(f"*step={stop}.ckpt")
        other = module()
        with torch.no_grad():
            other.net[0].weight.add_(1)
        assert same(run(other, str(path)), whole)
        path.unlink()
    saved = torch.load(next(tmp_path.glob("*step=12.ckpt")), weights_only=True)
    assert list(saved["state_dict"]) == list(whole.state_dict())
    assert all(
        torch.equal(saved["sparsetrain"]["modifiers"]["distillation"]["teacher"][name], value)
        for name, value in module().state_dict().items()
    )


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*")
def test_steps_without_a_loss_and_evaluation_pass_through(tmp_path: Path) -> None:
    model = module("some")
    trainer(tmp_path, 12, SparseTrainingCallback(METHOD), val_check_interval=4).fit(model, batches(), batches(8))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


class Failing(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        raise ZeroDivisionError


def test_an_exception_leaves_the_modules_own_step(tmp_path: Path) -> None:
    model, callback = module(), SparseTrainingCallback(METHOD)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, 12, callback, Failing()).fit(model, batches())
    assert "training_step" not in vars(model)
    trainer(tmp_path, 12, callback).fit(model, batches())
    assert "training_step" not in vars(model)


def test_copies_made_while_training_have_the_plain_step(tmp_path: Path) -> None:
    found: list[Any] = []

    class Copy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            assert type(vars(pl_module)["training_step"]).__name__ == "DistilledStep"
            found.extend((copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))))

    trainer(tmp_path, 2, SparseTrainingCallback(METHOD, total_steps=12), Copy()).fit(module(), batches())
    assert len(found) == 4
    assert all(other.training_step == types.MethodType(Classifier.training_step, other) for other in found)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, which it hides
def test_a_compiled_module_gets_its_compiled_step_back(tmp_path: Path) -> None:
    model = module()
    compiled = torch.compile(model, backend="eager")
    trainer(tmp_path, 3, SparseTrainingCallback(METHOD, total_steps=12)).fit(compiled, batches())
    torch._dynamo.reset()
    assert hasattr(vars(model)["training_step"], "_torchdynamo_orig_callable")
    for ours, theirs in zip(model.parameters(), plain_loop(3).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_manual_optimization_calls_it_by_itself(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self, kind: str) -> None:
            super().__init__(kind)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[0].argmax(1))
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(callback.training.distilled(loss) if self.kind == "distilled" else loss)
            optimizer.step()

    for strategy in ("auto", "ddp"):
        model, callback = module("distilled", Manual), SparseTrainingCallback(METHOD)
        trainer(tmp_path, 12, callback, strategy=strategy).fit(model, batches())
        assert same(model, plain_loop(12))
    model, callback = module("plain", Manual), SparseTrainingCallback(METHOD)
    with pytest.raises(RuntimeError, match=r"but distilled\(\) was not called since the last step"):
        trainer(tmp_path, 12, callback).fit(model, batches())


def test_without_distillation_the_module_keeps_its_step(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            seen.append("training_step" in vars(pl_module))

    trainer(tmp_path, 2, SparseTrainingCallback("fst"), Look()).fit(module(), batches())
    assert seen == [False, False]
