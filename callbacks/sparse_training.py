"""``SparseTrainingCallback``: sparse training in a Lightning ``Trainer``."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from sparsetrain.checkpoint import (
    CHECKPOINT_KEY,
    PRUNED_KEY,
    pruned_values,
    require_pruned,
    require_same_weights,
    restore_pruned_,
)
from sparsetrain.checkpoint.sparse_weights import sparse_state_dict
from sparsetrain.layers.claims import take_over
from sparsetrain.layers.options import check_options
from sparsetrain.methods import Method, resolve_method
from sparsetrain.methods.schedule import UNKNOWN_LENGTH
from sparsetrain.training import SparseTraining

from .distilled_step import DistilledStep
from .method_argument import register_method
from .metric_log import MetricLog
from .run_length import Position, RunLength
from .validation_check import ValidationCheck

SHARDED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
RUN_LENGTH = "run_length"

register_method()


class SparseTrainingCallback(Callback):
    """Train with 2:4 sparsity: add it to a ``Trainer``, change nothing else.

    The run's length comes from the trainer and follows it. When the fit ends, the layers are plain ones again, with
    zeros if the run ends sparse, and one line, ``callback.training.ending``, says what the model is. Checkpoints hold
    the sparse model (``load_from_checkpoint`` needs no callback) and, under ``checkpoint["sparsetrain"]``, what
    resuming bit for bit needs; with ``save_weights_only=True`` they hold the dense masters instead.

    Args:
        method: A preset's name, a ``Method``, or a mapping: ``preset`` with its arguments, or the fields of ``Method``
            with a ``schedule``; without either, it changes ``recommended``. A command line changes single values of it.
        targets: Which layers become sparse: ``"all-linear"``, ``"all-conv"``, ``"mlp"``, names of layers or submodules,
            globs or regular expressions, as in :func:`sparsetrain.select_layers`.
        exclude: Which do not.
        backend: Matmul backend: a name, or ``"auto"`` (the default): the fastest verified one, benchmarked here;
            without a GPU that is ``"masked"``.
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

    Raises:
        ValueError: If the method is unknown or has a bad value.

    Logged to every logger and to ``trainer.callback_metrics``, at every refresh, whatever ``log_every_n_steps`` is, and
    at the trainer's logging steps; a refresh before the first step, with that step:

    =====================================  =========================================================================
    ``sparsity/flip_rate``                 mask entries changed at the last refresh, a fraction; on the progress bar
    ``sparsity/virtual_flip_rate``         the same in a dense phase, of masks that are not applied
    ``sparsity/flip_rate_ratio``           the first over the second
    ``sparsity/kept_fraction``             Σ|W⊙M| / Σ|W|
    ``sparsity/kept_fraction_at_refresh``  the same, of the weights that the last mask search saw; with
                                           ``per_layer_metrics`` under ``sparsity/layer/<name>/`` too: what each layer
                                           lost when it was pruned
    ``sparsity/approximation_error``       mean |W - W⊙M|
    ``sparsity/kept_magnitude_mean``       mean |w| of kept entries
    ``sparsity/pruned_magnitude_mean``     mean |w| of pruned entries
    ``sparsity/pruned_count``              pruned entries, of ``sparsity/total_count``
    ``sparsity/nonfinite_count``           NaN and infinite weights
    ``sparsity/violations``                groups of four that do not keep what they should; must be 0
    ``sparsity/sparse_layers``             layers whose mask is in force
    ``sparsity/sparse_flops_share``        share of the layers' GEMM FLOPs that can run sparse now
    ``sparsity/age_mean``                  refreshes since an entry flipped, with ``track_age``
    ``sparsity/refresh_ms``                milliseconds of the last mask search
    ``sparsity/repack_ms``                 milliseconds of packing weights after the last step
    ``sparsity/operand_bytes``             bytes of packed weights on the device
    ``sparsity/distillation``              T²·KL from the teacher on the last batch, in nats, of a method that distils
    ``sparsity/clock``                     successful optimizer steps
    =====================================  =========================================================================

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = SparseTrainingCallback(targets="mlp")
        >>> trainer = Trainer(max_steps=100, callbacks=[callback], logger=False, enable_progress_bar=False)
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
    ) -> None:
        check_options(
            targets=targets, exclude=exclude, backend=backend, total_steps=total_steps, logits_from=logits_from,
            teacher=teacher, deterministic=deterministic, keep_transposed=keep_transposed, watch_dense=watch_dense,
            track_age=track_age, per_layer_metrics=per_layer_metrics, print_table=print_table,
        )  # fmt: skip
        self.method = resolve_method(method)
        self.targets = targets
        self.exclude = exclude
        self.backend = backend
        self.deterministic = deterministic
        self.keep_transposed = keep_transposed
        self.total_steps = total_steps
        self.watch_dense = watch_dense
        self.track_age = track_age
        self.per_layer_metrics = per_layer_metrics
        self.print_table = print_table
        self.logits_from = logits_from
        self.teacher = teacher
        self.training: SparseTraining | None = None
        self._loaded: dict[str, Any] | None = None
        self._position: Position | None = None  # in the checkpoint that the fit begins from
        self._length: RunLength | None = None
        self._final: dict[str, Any] | None = None
        self._final_optimizers: list[dict[str, Any]] = []
        self._metric_log: MetricLog | None = None
        self._guard: Any = None
        self._step: DistilledStep | None = None
        self._check = ValidationCheck()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything is built."""
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, SparseTrainingCallback) for callback in callbacks) > 1:
            raise MisconfigurationException(
                "trainer has more than one SparseTrainingCallback: use one, with all targets, so that one clock runs."
            )
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED_STRATEGIES:
            raise MisconfigurationException(
                f"strategy is {strategy}: SparseTrainingCallback needs whole weights on every rank, "
                "so use 'ddp' or one device."
            )
        if self.training is not None:  # an earlier fit, of another module, was interrupted
            self.training.finish(zeros=False)
        for clock in take_over(pl_module):
            rank_zero_info(f"layers of a run that was interrupted at step {clock} go on from their dense weights.")
        self.training = self._loaded = self._final = self._position = self._length = None
        self._final_optimizers = []
        self._metric_log = None
        self._release_guard()
        self._release_step()
        # a checkpoint of another model must be refused before any of its weights is copied
        register: Any = pl_module.register_load_state_dict_pre_hook
        self._guard = register(_refuse_foreign_weights)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the layers sparse and start, or go on from the checkpoint that was loaded."""
        self._release_guard()
        self._check = ValidationCheck()
        length = RunLength(trainer, self._position or Position.of(trainer))
        if length.nothing_left and self._loaded is None:
            rank_zero_warn(
                f"trainer has max_steps={trainer.max_steps} and max_epochs={trainer.max_epochs} and is there already: "
                "this fit trains no step, so the model stays as it is."
            )
            return
        total_steps = self._total_steps(length)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.training = SparseTraining(
            pl_module,
            trainer.optimizers,
            self.method,
            total_steps,
            self.targets,
            self.exclude,
            backend=self.backend,
            deterministic=self.deterministic,
            keep_transposed=self.keep_transposed,
            lr_schedulers=schedulers,
            teacher=self.teacher,
            logits_from=self.logits_from,
            watch_dense=self.watch_dense,
            track_age=self.track_age,
            state=self._loaded,
            verbose=False,
        )
        self._metric_log = MetricLog(self.training, self.per_layer_metrics, resumed=self._loaded is not None)
        if self._length is not None and self._length.is_measured and self._loaded is None:
            self.training.retime(None)  # until a batch has shown how many steps it takes
        self._restore_pruned()
        if self.method.distillation and pl_module.automatic_optimization:
            self._step = DistilledStep(pl_module, self.training.distilled)
        rank_zero_info(self.training.report.summary())
        if self.print_table and trainer.is_global_zero:
            self.training.report.print_table()
        description = {"method": self.method.describe(), "targets": self.targets, "exclude": list(self.exclude)}
        for logger in trainer.loggers:
            logger.log_hyperparams({"sparsity": description})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Follow the trainer's end; a checkpoint may have been saved before the end of the last batch was seen here."""
        self._follow(running=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the trainer's end, and log what the last optimizer step changed."""
        self._follow(running=False)
        if self._metric_log is not None:
            self._metric_log.after_batch(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Have the first batch that masks are in force for compared with plain masked weights."""
        self._check.begin(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Leave the module with its own forwards."""
        self._check.end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give plain layers back, say what the model is, keep what a checkpoint saved from now on needs to resume."""
        self._release_step()
        if self.training is not None:
            self._final = self._state(pl_module.state_dict())
            if self.training.adapters():  # which leave the optimizers now, but belong to what a later fit goes on from
                self._final_optimizers = [trainer.strategy.optimizer_state(entry) for entry in trainer.optimizers]
            self.training.finish()
            assert self.training.ending is not None
            say = rank_zero_info if self.training.ending.as_planned else rank_zero_warn
            say(str(self.training.ending))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no guard behind; the layers stay as they are until the next fit, so that a checkpoint can be saved."""
        self._release_guard()
        self._release_step()
        self._check.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module with its own training step."""
        self._release_step()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the sparse model into ``state_dict`` and everything else under ``checkpoint["sparsetrain"]``."""
        if self._final is not None:
            checkpoint[CHECKPOINT_KEY] = self._final
            if self._final_optimizers and "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = self._final_optimizers
        elif self.training is not None and not self.training.finished:
            masters = checkpoint["state_dict"]
            checkpoint[CHECKPOINT_KEY] = state = self._state(masters)
            if state[PRUNED_KEY]:
                merge = self.method.adapter_merge
                checkpoint["state_dict"] = sparse_state_dict(pl_module, masters, merge_adapters=merge)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state for ``on_fit_start``; if a fit is running (learning-rate finder), go back to it at once."""
        if trainer.state.fn != "fit":
            self._final = None  # the weights are the checkpoint's now, not those of the last fit
            return
        self._loaded = checkpoint.get(CHECKPOINT_KEY)
        self._position = Position.in_checkpoint(checkpoint)
        require_pruned(self._loaded, checkpoint["state_dict"])
        if self._loaded is None:
            rank_zero_warn(
                f"checkpoint has no {CHECKPOINT_KEY!r} state, so sparse training starts at step 0 of its schedule."
            )
        elif self.training is not None and not self.training.finished:
            self.training.load_state_dict(self._loaded)
            self._restore_pruned()

    def _state(self, masters: Mapping[str, Any]) -> dict[str, Any]:
        assert self.training is not None
        pruned = pruned_values(masters, self.training.masks.layers, self.method.adapter_merge)
        return {
            **self.training.state_dict(),
            PRUNED_KEY: {name: values.cpu() for name, values in pruned.items()},
            RUN_LENGTH: None if self._length is None else self._length.state_dict(),
        }

    def _total_steps(self, length: RunLength) -> int | None:
        """Return the steps of the whole run, and keep the object that follows them where they are the trainer's."""
        if self.total_steps is not None or not self.method.needs_total:
            return self.total_steps
        self._length = length
        saved = None if self._loaded is None else self._loaded.get("total_steps")
        if self._loaded is None or not isinstance(saved, int):
            return length.at_start() or UNKNOWN_LENGTH
        if not length.load_state_dict(self._loaded.get(RUN_LENGTH) or {}):
            rank_zero_warn("resuming with another end of the trainer: phases that have not begun follow it.")
        return saved

    def _follow(self, running: bool) -> None:
        if self._length is not None and self.training is not None:
            total_steps = self._length.at_batch(self.training.clock, running)
            if total_steps:
                if not self.training.clock:
                    self.method.schedule.resolve(total_steps)  # an error if the phases do not fit
                self.training.retime(total_steps)

    def _release_guard(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def _release_step(self) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None

    def _restore_pruned(self) -> None:
        if self._loaded is not None and self.training is not None:
            restore_pruned_(self.training.masks.layers, self._loaded["codes"], self._loaded.get(PRUNED_KEY, {}))
        self._loaded = None


def _refuse_foreign_weights(module: LightningModule, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # the hook's own argument is True whatever load_state_dict was given, which is strict_loading
    require_same_weights(module, state_dict, module.strict_loading and not _may_rename_keys(module))


def _may_rename_keys(module: nn.Module) -> bool:
    children = [child for child in module.modules() if child is not module]
    own_hooks = len(module._load_state_dict_pre_hooks) > 1 or any(
        child._load_state_dict_pre_hooks for child in children
    )
    plain = nn.Module._load_from_state_dict
    return own_hooks or any(type(child)._load_from_state_dict is not plain for child in children)
