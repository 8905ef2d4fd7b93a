from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from lightning_runs import Regression, batches
from models import mlp
from torch import Tensor, nn

import sparsetrain as st

MOVING = {"preset": "fst", "refresh_every": 3, "decay": 0.05, "dense_tail": 0, "warmup": 2}
METHODS: dict[str, Any] = {"masks move": MOVING, "frozen": {"preset": "asp_one_shot", "prune_at": 3}}


class Run:
    """Two micro-batches a step, clipped, in Fabric."""

    def __init__(self, precision: Any, method: Any, seed: int = 0) -> None:
        self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        model = mlp(seed=seed)
        self.inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.model, self.optimizer = self.fabric.setup(model, self.inner)
        self.training = st.SparseTraining(self.model, self.optimizer, method, 8, verbose=False)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "training": self.training}

    def steps(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.optimizer.zero_grad()
            for number in (2 * step, 2 * step + 1):
                x = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
                with self.fabric.no_backward_sync(self.model, enabled=number % 2 == 0):
                    self.fabric.backward((self.model(x) - x.flip(1)).square().mean() / 2)
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.1)
            self.optimizer.step()
            assert self.training.clock == step + 1


def masters(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    whole = Run(precision, METHODS[name])
    whole.steps(0, 4)
    whole.fabric.save(tmp_path / "state.ckpt", whole.parts)
    whole.steps(4, 8)
    resumed = Run(precision, METHODS[name], seed=1)
    resumed.fabric.load(tmp_path / "state.ckpt", resumed.parts, weights_only=True)
    resumed.steps(4, 8)
    for first, second in zip(masters(whole.model), masters(resumed.model), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(whole.inner.state.values(), resumed.inner.state.values(), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    codes = whole.training.masks.codes, resumed.training.masks.codes
    assert list(codes[0]) == list(codes[1]) == ["0", "2"]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])
    x = torch.randn(4, 16)
    expected = whole.model(x)
    whole.training.finish()
    assert (whole.model.module[0].weight == 0).float().mean() == 0.5
    torch.testing.assert_close(whole.model(x), expected)


def test_wrapped_gives_what_plain_gives() -> None:
    run = Run("32-true", MOVING)
    run.steps(0, 8)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    st.SparseTraining(model, optimizer, MOVING, 8, verbose=False)
    for step in range(8):
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
            ((model(x) - x.flip(1)).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    for first, second in zip(masters(run.model), masters(model), strict=True):
        assert torch.equal(first, second)


class ByHand(Regression):
    """Manual optimization, with the engine on what ``self.optimizers()`` gives."""

    training_: st.SparseTraining

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def on_train_start(self) -> None:
        self.training_ = st.SparseTraining(self, self.optimizers(), MOVING, 8, ["net.0"], verbose=False)  # type: ignore[arg-type]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.net(batch[0]) - batch[0].flip(1)).square().mean())
        optimizer.step()


def test_optimizers_of_a_lightning_module_are_unwrapped(tmp_path: Path) -> None:
    module: LightningModule = ByHand()
    Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    ).fit(module, batches())  # fmt: skip
    assert module.training_.clock == 8
    assert module.training_.metrics()["sparse_layers"] == 1
