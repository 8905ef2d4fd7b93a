"""Fits of Lightning's ``ModelParallelStrategy`` on ranks that stand by (``ranks.py``), and in one process."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_runs import batches
from sharded_runs import blocks, outcome, parallelize_block, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sparsetrain.callbacks import SparseTrainingCallback

STEPS = 8
"""Of an epoch."""

Shape = tuple[int, int]
"""Of the mesh: data parallel, tensor parallel."""


class StandingRanks(LightningEnvironment):
    """The processes that are there already."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return dist.get_rank()

    def teardown(self) -> None:
        pass


class Blocks(LightningModule):
    """Blocks that are built and sharded in ``configure_model``, over the dimensions of the mesh that are there.

    Args:
        form: "shared" if the second block is the first, "compiled" if the first is wrapped by ``torch.compile``.
    """

    def __init__(self, form: str = "") -> None:
        super().__init__()
        self.form = form
        self.net: nn.Module | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is not None:
            return
        net: Any = blocks()
        self.net = net
        if self.form == "shared":
            net[1] = net[0]
        self._shard()
        if self.form == "compiled":
            net[0] = torch.compile(net[0], backend="eager")

    def _shard(self) -> None:
        mesh = self.device_mesh
        if mesh is None:
            return
        assert self.net is not None
        data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        for block in dict.fromkeys(self.net[:-1]):  # type: ignore[index]
            if tensor.size() > 1:
                parallelize_block(block, tensor)
            if data.size() > 1:
                fully_shard(block, mesh=data)
        if data.size() > 1:
            fully_shard(self.net, mesh=data)

    def loss(self, batch: list[Tensor]) -> Tensor:
        assert self.net is not None
        found: Tensor = self.net(batch[0]).square().mean()
        return found

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(self.loss(batch).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Rows(Logger):
    """Keeps what is logged, on the ranks that log."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Watch(Callback):
    """Saves after some steps, at the end of their batches; keeps what there is to compare before layers are plain."""

    def __init__(self, sparse: SparseTrainingCallback, saves: Mapping[int, str]) -> None:
        self.sparse, self.saves = sparse, saves
        self.outcome: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in self.saves:
            trainer.save_checkpoint(self.saves[trainer.global_step])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.sparse.training is not None
        self.outcome = outcome(pl_module, self.sparse.training)


def trainer_of(shape: Shape | None, *callbacks: Callback, in_shards: bool = True, **options: Any) -> Trainer:
    """Return a trainer of the ranks' mesh; of one device without a shape."""
    if shape is not None:
        options["strategy"] = ModelParallelStrategy(*shape, save_distributed_checkpoint=in_shards)
        options["plugins"] = [StandingRanks()]
        options["devices"] = dist.get_world_size()
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(
    method: Any,
    shape: Shape | None = None,
    saves: Mapping[int, str] = {},
    source: str | None = None,
    ends: tuple[int, ...] = (1,),
    in_shards: bool = True,
    validates: str = "",
    form: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Fit, from a checkpoint if there is a source, and return what there is to compare.

    Args:
        method: Of the callback.
        shape: Of the mesh; None for one process with whole weights.
        saves: Step to the path that is saved after it; 0 for after the fit.
        source: Checkpoint to go on from.
        ends: Epochs at which fits end, one after the other.
        in_shards: How is saved.
        validates: Checkpoint that a trainer without the callback validates in the end.
        form: Of the blocks.
        options: Of the callback.
    """
    module, callback, rows = Blocks(form), SparseTrainingCallback(method, exclude=".*2$", **options), Rows()
    watch = Watch(callback, saves)
    trainer = trainer_of(shape, callback, watch, in_shards=in_shards, logger=rows, val_check_interval=3)
    for end in ends:
        trainer.fit_loop.max_epochs = end
        trainer.fit(module, batches(4 * STEPS), batches(4), ckpt_path=source)
    assert callback.training is not None
    if 0 in saves:
        trainer.save_checkpoint(saves[0])
    if validates:
        trainer_of(shape, in_shards=in_shards).validate(module, batches(4), ckpt_path=validates, verbose=False)
    ended = {name: whole(value) for name, value in module.state_dict().items()}
    said = str(callback.training.ending)
    return {**watch.outcome, "losses": module.losses, "rows": rows.rows, "ended": ended, "ending": said}
