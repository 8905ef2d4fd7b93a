import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sparsetrain.recipes.data import ResumableLoader, TextDataModule
from sparsetrain.recipes.data.documents import Blocks
from sparsetrain.recipes.gpt import GPTModule

BLOCKS = Blocks(torch.arange(96, dtype=torch.uint8), 2)  # 48 examples: 12 batches of 4 an epoch


class Recorder(LightningModule):
    """Notes its batches; the weight depends on their values and order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.seen: list[list[int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch[:, 0].tolist())
        return (batch / 96 @ self.weight - 1).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.weight], 1e-2)


def fit(folder: Path, checkpoint: Path | None = None, workers: int = 0, save: Any = None, **options: Any) -> Recorder:
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, enable_checkpointing=save is not None,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1, **save)] if save else [], **options,
    )  # fmt: skip
    trainer.fit(model, ResumableLoader(BLOCKS, 4, seed=0, num_workers=workers), ckpt_path=checkpoint, weights_only=True)
    return model


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.parametrize(
    ("save", "options", "checkpoints"),
    [
        pytest.param(
            {"every_n_train_steps": 1}, {"max_steps": 14, "accumulate_grad_batches": 2}, 14, id="accumulation"
        ),
        pytest.param({"every_n_train_steps": 1}, {"max_steps": 8, "accumulate_grad_batches": 5}, 8, id="uneven"),
        pytest.param({"every_n_train_steps": 5}, {"max_epochs": 3}, 7, id="inside-epochs"),
        pytest.param({"save_on_train_epoch_end": True}, {"max_epochs": 3}, 3, id="ends-of-epochs"),
        pytest.param({"every_n_train_steps": 1}, {"max_epochs": 3, "limit_train_batches": 5}, 15, id="limited"),
        pytest.param({"every_n_train_steps": 7}, {"max_steps": 30, "workers": 2}, 4, id="workers"),
    ],
)
def test_resuming_from_any_checkpoint_equals_the_uninterrupted_run(
    tmp_path: Path, save: dict[str, Any], options: dict[str, Any], checkpoints: int
) -> None:
    options = {"max_epochs": -1, **options}
    whole = fit(tmp_path, save=save, **options)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == checkpoints
    for path in paths:
        resumed = fit(tmp_path / "resumed", path, **options)
        done = len(whole.seen) - len(resumed.seen)
        progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert done == progress["ready"], path.name
        assert resumed.seen == whole.seen[done:], path.name
        assert torch.equal(resumed.weight, whole.weight), path.name


def test_every_epoch_of_a_trainer_begins_its_own_order() -> None:
    loader = ResumableLoader(BLOCKS, 4, seed=0)
    orders = [[batch[:, 0].tolist() for batch in loader] for _ in range(3)]
    limited = fit(Path(), max_epochs=3, limit_train_batches=5)
    assert limited.seen == list(chain(*(order[:5] for order in orders)))
    reloaded = fit(Path(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert reloaded.seen == list(chain(*orders))
    assert all(sorted(chain(*order)) == list(range(0, 96, 2)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_order_depends_on_seed_and_epoch_alone_and_ranks_share_nothing() -> None:
    def epochs(**options: int) -> list[list[list[int]]]:
        loader = ResumableLoader(BLOCKS, 4, **{"seed": 0, **options})
        return [[batch[:, 0].tolist() for batch in loader] for _ in range(2)]

    assert epochs() == epochs()
    assert epochs()[1] != epochs(seed=1)[1]
    ranks = [list(chain(*epochs(rank=rank, world=2)[0])) for rank in range(2)]
    assert sorted(chain(*ranks)) == list(range(0, 96, 2))
    assert set(ranks[0]).isdisjoint(ranks[1])


def test_without_a_trainer_a_state_is_a_position_and_a_new_iteration_a_new_epoch() -> None:
    loader, resumed = (ResumableLoader(BLOCKS, 4, seed=3) for _ in range(2))
    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
    for taken, rest in ((5, epochs[0][5:]), (0, epochs[0]), (12, epochs[1])):
        resumed.load_state_dict({"epoch": 0, "taken": taken})
        assert [batch.tolist() for batch in resumed] == rest
    resumed.load_state_dict({"epoch": 0, "taken": 2})
    next(iter(resumed))
    assert resumed.state_dict() == {"epoch": 0, "taken": 3}
    assert [batch.tolist() for batch in resumed] == epochs[1]


def test_too_few_examples_for_the_processes_are_named() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 25: 48 examples on 2 process\(es\) allow 1 to 24"):
        ResumableLoader(BLOCKS, 25, seed=0, world=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        ResumableLoader(BLOCKS, 0, seed=0)
    assert len(ResumableLoader(BLOCKS, 24, seed=0, world=2)) == 1


def text_and_model(folder: Path) -> tuple[TextDataModule, GPTModule]:
    source = folder / "text.txt"
    source.write_text("".join(f"{number} bottles\n" for number in range(600)))
    torch.manual_seed(0)
    data = TextDataModule(str(source), context=16, batch_size=8, cache_dir=str(folder / "cache"))
    return data, GPTModule(width=16, depth=1, heads=2, context=16, warmup_steps=2)


def test_a_gpt_resumed_between_validations_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    def run(checkpoint: Path | None) -> GPTModule:
        data, model = text_and_model(tmp_path)
        trainer = Trainer(
            max_steps=40, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=2, val_check_interval=10, check_val_every_n_epoch=None,
            callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=13, save_top_k=-1)], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.current_epoch >= 1  # the run crosses the end of an epoch
        return model

    whole = run(None)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        resumed = run(path)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)), path.name


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    data, _ = text_and_model(tmp_path)
    model = Recorder()
    model.weight = torch.nn.Parameter(torch.ones(17))
    trainer = Trainer(
        max_epochs=2, overfit_batches=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, data)
    assert len(model.seen) == 6
    assert model.seen[:3] == model.seen[3:]


TWO_PROCESSES = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import Trainer
from sparsetrain.recipes.data import TextDataModule
from sparsetrain.recipes.gpt import GPTModule

class Recorder(GPTModule):
    def training_step(self, batch, batch_idx):
        self.__dict__.setdefault("seen", []).extend(bytes(row.tolist()) for row in batch)
        return super().training_step(batch, batch_idx)

data = TextDataModule(sys.argv[1], context=16, batch_size=8, cache_dir=sys.argv[2])
model = Recorder(width=16, depth=1, heads=2, context=16)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, limit_val_batches=1, logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
)
trainer.fit(model, data)
seen = [None, None]
torch.distributed.all_gather_object(seen, model.seen)
if trainer.global_rank == 0:
    half = [len(rows) // 2 for rows in seen]
    first = [set(rows[:count]) for rows, count in zip(seen, half)]
    print("shared", len(first[0] & first[1]), "counts", half)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.sweep
def test_two_processes_train_on_different_examples(tmp_path: Path) -> None:
    text_and_model(tmp_path)
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, str(script), str(tmp_path / "text.txt"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("shared")]
    size = int(((tmp_path / "text.txt").stat().st_size + 1) * 0.95)
    count = size // 17 // 16 * 8  # blocks of 17 bytes in whole batches of 8 for each of the two
    assert line == f"shared 0 counts [{count}, {count}]"
