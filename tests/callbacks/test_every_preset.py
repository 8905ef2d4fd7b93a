"""Every preset in a Trainer: whole, resumed from checkpoints inside of its phases, and fitted again."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning_runs import batches
from models import convnet, mlp
from torch import Tensor, nn

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import PRESETS

STEPS = 12
ARGUMENTS: dict[str, dict[str, Any]] = {
    "fst": {"refresh_every": 3, "decay": 0.01},
    "recommended": {"refresh_every": 2},
    "slope": {"adapter_start": 5, "adapter_rank": 2, "refresh_every": 3},
    "dense_to_sparse_finetune": {"distillation": 0.5, "refresh_every": 3},
}


class Module(LightningModule):
    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = build()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0].flip(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:ends (dense|2.4). .*the schedule stopped at step")
@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("preset", PRESETS)
def test_it_resumes_bit_for_bit_and_fits_again(preset: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    def fit(steps: int, seed: int = 0, **options: Any) -> tuple[Module, Trainer]:
        seed_everything(seed, verbose=False)
        module = Module(build)
        callback = SparseTrainingCallback(
            {"preset": preset, **ARGUMENTS.get(preset, {})}, targets=["all-linear", "all-conv"][build is convnet],
            total_steps=STEPS,
        )  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, callbacks=[callback],
            default_root_dir=tmp_path, gradient_clip_val=0.5, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, batches(), **options)
        return module, trainer

    whole, trainer = fit(STEPS)
    keys = list(Module(build).state_dict())
    assert list(whole.state_dict()) == keys
    for stop in (1, 6, 10):
        path = tmp_path / f"{stop}.ckpt"
        fit(stop)[1].save_checkpoint(path)
        plain = Module(build)
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        resumed, _ = fit(STEPS, seed=1, ckpt_path=path, weights_only=True)
        for name, value in resumed.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), (stop, name)
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit(whole, batches())
    assert all(parameter.isfinite().all() for parameter in whole.parameters())
