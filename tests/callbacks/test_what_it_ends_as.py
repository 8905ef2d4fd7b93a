"""Every preset, in every way a fit begins and ends: the model is what its schedule says, and the line says so."""

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning_runs import batches
from models import mlp
from torch import Tensor, nn

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import PRESETS, recommended

STEPS = 12

# what the model is at the end of the run, and when it is stopped after 4 of 12 steps: 2:4 layers of the two, by hand:
# one-shot prunes at 6; three rounds begin at 3, 5 and 7 and the first prunes one layer; the dense tail begins at 10
PLANS: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "asp_one_shot": ({}, 2, 0),
    "dense_to_sparse_finetune": ({}, 2, 2),
    "fst": ({}, 0, 2),
    "iterative": ({}, 2, 1),
    "recommended": ({}, 2, 2),
    "s_ste": ({}, 2, 2),
    "slope": ({"adapter_start": 5, "adapter_rank": 2}, 0, 2),
    "sr_ste": ({}, 2, 2),
    "step": ({}, 2, None),  # its head ends when moments have settled
}


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return (self.net(batch[0]) - batch[0].flip(1)).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TwoOptimizers(Module):
    """Each owns one of the two layers, and both step in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters(), lr=1e-2) for layer in (self.net[0], self.net[2])]


class Stop(Callback):
    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            if self.path is not None:
                trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": STEPS, "max_epochs": -1, "logger": False, "default_root_dir": folder,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def first_fit(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    module = Module()
    return module, said(lambda: trainer(folder, callback).fit(module, batches()))


def second_fit(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    module, fitter = Module(), trainer(folder, callback)
    fitter.fit(module, batches())
    fitter.fit_loop.epoch_loop.max_steps = 2 * STEPS
    return module, said(lambda: fitter.fit(module, batches()))


def second_fit_by_epochs(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    module, fitter = Module(), trainer(folder, callback, max_steps=-1, max_epochs=1)
    fitter.fit(module, batches(64))
    fitter.fit_loop.max_epochs = 4
    return module, said(lambda: fitter.fit(module, batches(16)))  # other data: 3 epochs of 4 batches


def resumed(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    said(lambda: trainer(folder, callback, Stop(folder / "four.ckpt")).fit(Module(), batches()))
    module = Module()
    again = SparseTrainingCallback(callback.method)
    line = said(
        lambda: trainer(folder, again).fit(module, batches(), ckpt_path=folder / "four.ckpt", weights_only=True)
    )
    callback.training = again.training
    return module, line


def from_a_dense_checkpoint(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    trainer(folder, Stop(folder / "dense.ckpt")).fit(Module(), batches())
    module, fitter = Module(), trainer(folder, callback, max_steps=4 + STEPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="checkpoint has no 'sparsetrain' state")
        return module, said(lambda: fitter.fit(module, batches(), ckpt_path=folder / "dense.ckpt", weights_only=True))


def stopped_early(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    module = Module()
    return module, said(lambda: trainer(folder, callback, Stop()).fit(module, batches()))


def two_optimizers(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    if callback.method.distillation:
        pytest.skip("a loop of one's own calls training.distilled")
    module = TwoOptimizers()
    return module, said(lambda: trainer(folder, callback, max_steps=2 * STEPS).fit(module, batches()))


def accumulation(folder: Path, callback: SparseTrainingCallback) -> tuple[Module, list[str]]:
    module, fitter = Module(), trainer(folder, callback, accumulate_grad_batches=3, max_steps=-1, max_epochs=4)
    return module, said(lambda: fitter.fit(module, batches(28)))  # 4 epochs of 7 batches make 3 steps each


def said(fit: Callable[[], Any]) -> list[str]:
    """Run a fit; return the warnings about how it ended."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="ends ")  # every other one stays an error
        fit()
    return [str(entry.message) for entry in caught]


def two_of_four_layers(module: nn.Module) -> list[Tensor]:
    """The weights in which at most two of every four neighbours in a row are not zero, by loops."""
    found = []
    for layer in (module.net[0], module.net[2]):
        groups = [row[left : left + 4] for row in layer.weight.tolist() for left in range(0, len(row), 4)]
        if all(sum(entry != 0 for entry in group) <= 2 for group in groups):
            found.append(layer.weight.detach())
    return found


WAYS = [first_fit, second_fit, resumed, stopped_early, two_optimizers, accumulation]


@pytest.mark.parametrize(
    ("preset", "way"),
    [(preset, way) for preset in PRESETS for way in WAYS]
    + [("asp_one_shot", second_fit_by_epochs), ("asp_one_shot", from_a_dense_checkpoint)],
)
def test_it_ends_as_announced(
    preset: str, way: Callable[[Path, SparseTrainingCallback], tuple[Module, list[str]]], tmp_path: Path
) -> None:
    arguments, planned, stopped = PLANS[preset]
    callback = SparseTrainingCallback({"preset": preset, **arguments})
    module, warned = way(tmp_path, callback)
    sparse = two_of_four_layers(module)
    expected = stopped if way is stopped_early else planned
    assert expected is None or len(sparse) == expected
    assert type(module.net[0]) is nn.Linear
    training = callback.training
    assert training is not None
    assert training.clock == (4 if way is stopped_early else STEPS)
    line = str(training.ending)
    if sparse:
        zeros = sum(int((weight == 0).sum()) for weight in sparse) / sum(weight.numel() for weight in sparse)
        layers = "2 layers" if len(sparse) == 2 else "1 layer, 1 layer dense"
        assert re.match(re.escape(f"ends 2:4: {100 * zeros:.1f} % zeros in {layers}") + "(;|$)", line), line
    else:
        assert line.startswith("ends dense: "), line
    assert warned == ([] if len(sparse) == planned else [line])
    assert bool(re.search("stopped at step 4( of 12)?, before", line)) == (
        way is stopped_early and preset not in COMPLETE
    )


COMPLETE = {"recommended", "s_ste", "sr_ste"}  # whose last phase has begun after 4 steps, and in which nothing follows


def test_the_default_is_the_recommended_method_and_ends_two_of_four(tmp_path: Path) -> None:
    callback, module = SparseTrainingCallback(), Module()
    trainer(tmp_path, callback).fit(module, batches())
    assert [float((weight == 0).float().mean()) for weight in two_of_four_layers(module)] == [0.5, 0.5]
    assert callback.method == recommended()


def test_the_line_says_when_the_masks_would_have_come(tmp_path: Path) -> None:
    callback, module = SparseTrainingCallback("asp_one_shot"), Module()
    warned = said(lambda: trainer(tmp_path, callback, Stop(), max_steps=52).fit(module, batches(208)))
    line = "ends dense: the schedule stopped at step 4 of 52, before masks freeze at step 26"
    assert (str(callback.training and callback.training.ending), warned) == (line, [line])
