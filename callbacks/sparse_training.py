"""``SparseTrainingCallback``: sparse training in a Lightning ``Trainer``."""

from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from sparsetrain.layers.sharded.gathering import GatherMode
from sparsetrain.methods import Method, resolve_method

from .distilled_step import DistilledStep
from .fit_checks import check_trainer, refuse_foreign_weights
from .method_argument import register_method
from .metric_log import MetricLog
from .model_parallel import is_model_parallel, plain_part, state_to_load
from .run_length import Position, RunLength
from .saved_fit import SavedFit
from .validation_check import ValidationCheck

register_method()


class SparseTrainingCallback(SavedFit):
    """Train with 2:4 sparsity: add it to a ``Trainer``, change nothing else.

    The run's length comes from the trainer and follows it. When the fit ends, the layers are plain ones again, with
    zeros if the run ends sparse, and one line, ``callback.training.ending``, says what the model is. Checkpoints hold
    the sparse model (``load_from_checkpoint`` needs no callback) and, under ``checkpoint["sparsetrain"]``, what
    resuming bit for bit needs; with ``save_weights_only=True`` they hold the dense masters instead. Metrics are logged
    under ``sparsity/``: :class:`sparsetrain.callbacks.metric_log.MetricLog` lists them.

    Under ``ModelParallelStrategy`` the run begins after ``on_fit_start``, once a checkpoint is loaded, and checkpoints
    may be in shards: ``docs/scaling.md``.

    Args:
        method: A preset's name, a ``Method``, or a mapping: ``preset`` with its arguments, or the fields of ``Method``
            with a ``schedule``; without either, it changes ``recommended``. A command line changes single values of it.
        targets: Which layers become sparse: ``"all-linear"``, ``"all-conv"``, ``"mlp"``, names of layers or submodules,
            globs or regular expressions, as in :func:`sparsetrain.select_layers`.
        exclude: Which do not.
        backend: Matmul backend, as in :func:`sparsetrain.sparsify_`.
        deterministic: With ``"auto"``, choose one verified algorithm a layer by name instead of by time.
        keep_transposed: Keep Wᵀ packed between steps; False packs it in every backward and saves 9/16 of a 16-bit
            weight.
        total_steps: Optimizer steps of the whole run, as ``training.clock`` counts them; None asks the trainer: what
            this fit will take, with manual optimization by the steps that batches have taken so far.
        watch_dense: Search masks in dense phases as well, without applying them, to log how often they would flip.
        track_age: Keep and log the age of mask entries (one byte a weight).
        per_layer_metrics: Log the metrics of every layer under ``sparsity/layer/<name>/``: ``flip_rate``,
            ``kept_fraction`` and the others of magnitudes and counts.
        print_table: Print the table of all linear and convolutional layers, with the reasons of those that stay dense.
        logits_from: With a method that distils, name of the submodule that gives the logits; "" is the module itself,
            whose ``forward`` the training step must call then. Every loss the training step returns goes through
            ``training.distilled``; with manual optimization, call ``callback.training.distilled(loss)`` yourself.
        teacher: Who teaches, if it is not the model's own dense weights.
        gather: With ``ModelParallelStrategy``, what FSDP2 gathers of a weight whose mask is in force: ``"auto"``,
            ``"masked"`` or ``"packed"``, as in :class:`sparsetrain.SparseTraining`.

    Raises:
        ValueError: If the method is unknown or has a bad value.
        MisconfigurationException: In ``setup``, if the strategy is ``FSDPStrategy`` or ``DeepSpeedStrategy``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = SparseTrainingCallback(targets="mlp")
        >>> trainer = Trainer(max_steps=100, callbacks=[callback], logger=False, enable_progress_bar=False)

        A preset with other values:

        >>> callback = SparseTrainingCallback({"preset": "asp_one_shot", "prune_at": 0.25}, exclude="head")
        >>> callback.method.schedule.resolve(100).starts
        (0, 25)
    """

    def __init__(
        self,
        method: Method | dict[str, Any] | str = "recommended",  # jsonargparse tries the types in this order
        targets: str | list[str] = "all-linear",
        exclude: str | list[str] | tuple[str, ...] = (),
        backend: str = "auto",
        deterministic: bool = False,
        keep_transposed: bool = True,
        total_steps: int | None = None,
        watch_dense: bool = True,
        track_age: bool = False,
        per_layer_metrics: bool = False,
        print_table: bool = False,
        logits_from: str = "",
        teacher: nn.Module | None = None,
        gather: GatherMode = "auto",
    ) -> None:
        super().__init__(
            targets=targets,
            exclude=exclude,
            backend=backend,
            deterministic=deterministic,
            keep_transposed=keep_transposed,
            total_steps=total_steps,
            watch_dense=watch_dense,
            track_age=track_age,
            per_layer_metrics=per_layer_metrics,
            print_table=print_table,
            logits_from=logits_from,
            teacher=teacher,
            gather=gather,
        )
        self.method = resolve_method(method)
        self._forget()

    @override
    def _forget(self) -> None:
        super()._forget()
        self._metric_log: MetricLog | None = None
        self._check = ValidationCheck()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is built."""
        if stage != "fit":
            return
        check_trainer(trainer, SparseTrainingCallback)
        for said in self._take_over(pl_module):
            rank_zero_info(said)
        self._forget()
        self._hooks.callback(refuse_foreign_weights(pl_module).remove)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the layers sparse and start, or go on from the checkpoint that was loaded.

        Where a checkpoint is loaded after this (``ModelParallelStrategy``), the run begins after that too.
        """
        if not is_model_parallel(trainer):
            self._start(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, if no checkpoint was loaded into a sharded model."""
        self._start_late(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, if no checkpoint was loaded into a sharded model."""
        self._start_late(trainer, pl_module)

    def _start_late(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_model_parallel(trainer) and self.training is None:
            self._start(trainer, pl_module)

    @override
    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hooks.close()
        self._check = ValidationCheck()
        length = RunLength(trainer, self._position or Position.of(trainer))
        if length.nothing_left and self._loaded is None:
            rank_zero_warn(
                f"trainer has max_steps={trainer.max_steps} and max_epochs={trainer.max_epochs} and is there already: "
                "this fit trains no step, so the model stays as it is."
            )
            return
        if self.total_steps is None and self.method.needs_total:
            self._length = length
        total_steps = self.total_steps if self._length is None else length.at_start(plain_part(self._loaded))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        state = state_to_load(trainer, self._loaded)
        training = self._begin(pl_module, trainer.optimizers, total_steps, schedulers, state)
        self._metric_log = MetricLog(training, self.per_layer_metrics, resumed=self._loaded is not None)
        if self._loaded is None and self._length is not None and length.is_measured:
            training.retime(None)  # until a batch has shown how many steps it takes
        self._loaded = None
        if self.method.distillation and pl_module.automatic_optimization:
            self._hooks.callback(DistilledStep(pl_module, training.distilled).remove)
        rank_zero_info(training.report.summary())
        if self.print_table and trainer.is_global_zero:
            training.report.print_table()
        description = {"method": training.method.describe(), "targets": self.targets, "exclude": list(self.exclude)}
        for logger in trainer.loggers:
            logger.log_hyperparams({"sparsity": description})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Follow the trainer's end; a checkpoint may have been saved before the end of the last batch was seen here."""
        self._follow(running=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the trainer's end, and log what the last optimizer step changed."""
        self._follow(running=False)
        if self._metric_log is not None:
            self._metric_log.after_batch(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Have the first batch that masks are in force for compared with plain masked weights."""
        self._check.begin(trainer, pl_module)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Leave the module with its own forwards."""
        self._check.end()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give plain layers back, say what the model is, keep what a checkpoint saved from now on needs to resume."""
        self._hooks.close()
        if self.training is None:
            return
        self._keep(trainer, pl_module)
        self.training.finish()
        assert self.training.ending is not None
        say = rank_zero_info if self.training.ending.as_planned else rank_zero_warn
        say(str(self.training.ending))

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no guard behind; the layers stay as they are until the next fit, so that a checkpoint can be saved."""
        self._hooks.close()
        self._check.end()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module with its own training step."""
        self._hooks.close()

    def _follow(self, running: bool) -> None:
        if self._length is not None and self.training is not None:
            self._length.follow(self.training, running)
