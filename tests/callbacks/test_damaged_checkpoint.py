"""Lightning checkpoints whose state of sparse training is damaged."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning_runs import Regression, batches
from torch import nn

from sparsetrain.callbacks import SparseTrainingCallback

METHOD = {"preset": "recommended", "warmup": 2, "refresh_every": 2}


class Save(Callback):
    """Saves after the fourth step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 4 and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(*callbacks: Callback, path: Path | None = None) -> tuple[Regression, Trainer]:
    module = Regression()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=6, accelerator="cpu", enable_checkpointing=False, callbacks=list(callbacks), **quiet)
    trainer.fit(module, batches(), ckpt_path=path)
    return module, trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "half.ckpt"
    fit(SparseTrainingCallback(METHOD), Save(path))
    return path


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda state: [state], "'sparsetrain' is a list of 1: it must be a dict; the checkpoint is damaged"),
    "no pruned values": (
        lambda state: {key: value for key, value in state.items() if key != "pruned_weights"},
        "'sparsetrain' has no 'pruned_weights'; the checkpoint is damaged",
    ),
    "pruned values of one layer": (
        lambda state: {**state, "pruned_weights": dict([*state["pruned_weights"].items()][:1])},
        "pruned values have no 'net.2', whose weight it holds",
    ),
    "pruned values as a list": (
        lambda state: {**state, "pruned_weights": []},
        r"\['pruned_weights'\] is \[\]: it must",
    ),
    "pruned values that are ints": (
        lambda state: {**state, "pruned_weights": {name: v.int() for name, v in state["pruned_weights"].items()}},
        "pruned values of layer 'net.0' is a Tensor of torch.int32",
    ),
    "active layers that are a number": (lambda state: {**state, "active": 3}, r"\['active'\] is 3: it must be a list"),
    "a clock that is text": (lambda state: {**state, "clock": "4"}, r"state\['clock'\] is '4': it must be an int"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_stops_the_fit_before_it_trains(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    change, sentence = DAMAGES[damage]
    saved = torch.load(checkpoint, weights_only=True)
    saved["sparsetrain"] = change(copy.deepcopy(saved["sparsetrain"]))
    torch.save(saved, tmp_path / "damaged.ckpt")
    module = Regression()
    trainer = Trainer(
        max_steps=6, accelerator="cpu", enable_checkpointing=False, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SparseTrainingCallback(METHOD)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        trainer.fit(module, batches(), ckpt_path=tmp_path / "damaged.ckpt")
    assert [type(layer) for layer in module.net] == [nn.Linear, nn.Tanh, nn.Linear]
    assert trainer.global_step in (0, 4)


def test_a_sound_one_goes_on(checkpoint: Path) -> None:
    module, trainer = fit(SparseTrainingCallback(METHOD), path=checkpoint)
    assert trainer.global_step == 6
    assert (module.net[0].weight == 0).float().mean() == 0.5
