"""``HuggingFaceSparseTraining``: sparse training in Hugging Face's ``Trainer``."""

import logging
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

from torch import nn

from sparsetrain.checkpoint import PRUNED_KEY, pruned_values, restore_pruned_, weight_key
from sparsetrain.checkpoint.carried_state import CarriedState, load_apart, take_carried
from sparsetrain.checkpoint.sparse_weights import evaluated_in_state_dicts
from sparsetrain.distributed.wrappers import plain_optimizer
from sparsetrain.hardware.extras import require
from sparsetrain.layers.claims import take_over
from sparsetrain.layers.options import check_options
from sparsetrain.methods import Method, resolve_method
from sparsetrain.training import SparseTraining

require("transformers", "hf", "HuggingFaceSparseTraining")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.trainer_callback import DefaultFlowCallback  # noqa: E402

log = logging.getLogger(__name__)


class HuggingFaceSparseTraining(TrainerCallback):
    """Train with 2:4 sparsity: add it to a ``transformers.Trainer``, change nothing else.

    The twin of :class:`SparseTrainingCallback`, with the same arguments, phases and metrics. The run's length comes
    from the trainer and follows it. After ``train()`` the layers are plain ones again, with zeros if the run ends
    sparse, and one line, ``callback.training.ending``, says what the model is. While it trains, everything that is
    saved from ``model.state_dict()`` is the sparse model: checkpoints, ``trainer.save_model()``,
    ``model.save_pretrained()``. What resuming bit for bit needs besides is in a checkpoint's ``optimizer.pt``, so
    ``train(resume_from_checkpoint=...)`` finds it in any folder; with ``save_only_model=True`` there is none. With
    ``load_best_model_at_end`` the model ends as the best checkpoint has it.

    Metrics are added to what the trainer logs at its logging steps and at every refresh, and so to
    ``trainer.state.log_history``. The trainer's own loggers come before callbacks that it is given; :meth:`attach` puts
    this one before them.

    With a method that distils, override ``Trainer.compute_loss`` to return ``callback.training.distilled(loss)``.

    Args:
        method: A preset's name, a ``Method``, or a mapping: ``preset`` with its arguments, or the fields of ``Method``.
        targets: Which layers become sparse, as in :func:`sparsetrain.select_layers`.
        exclude: Which do not.
        backend: Matmul backend: a name, or ``"auto"`` (the default): the fastest verified one, benchmarked here;
            without a GPU that is ``"masked"``.
        deterministic: With ``"auto"``, choose one verified algorithm a layer by name instead of by time.
        keep_transposed: Keep Wᵀ packed between steps; False packs it in every backward and saves 9/16 of a 16-bit
            weight.
        total_steps: Optimizer steps of the whole run, as ``training.clock`` counts them; None asks the trainer.
        watch_dense: Search masks in dense phases as well, without applying them, to log how often they would flip.
        track_age: Keep and log the age of mask entries (one byte a weight).
        per_layer_metrics: Log the metrics of every layer under ``sparsity/layer/<name>/``.
        print_table: Print the table of all linear and convolutional layers, with the reasons of those that stay dense.
        logits_from: With a method that distils, name of the submodule that gives the logits; "" is the model itself.
        teacher: Who teaches, if it is not the model's own dense weights.

    Raises:
        ValueError: If the method is unknown or has a bad value; when training begins, if the trainer shards weights or
            copies the model, or as :class:`sparsetrain.SparseTraining`.
        ImportError: On import, if transformers is not installed.

    Example:
        >>> callback = HuggingFaceSparseTraining(targets="mlp")
        >>> # Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        method: str | Method | dict[str, Any] = "recommended",
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
        self._hooks = ExitStack()  # of what hangs on the model and the optimizer beside the engine
        self._logged_clock = -1
        self._weights_loaded = False
        self._is_attached = False

    def attach(self, trainer: Trainer) -> Self:
        """Put the callback into a trainer, before its loggers, so that metrics reach all of them.

        Args:
            trainer: Whether or not it has the callback already.

        Returns:
            The callback.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        flow = [number for number, entry in enumerate(callbacks) if isinstance(entry, DefaultFlowCallback)]
        callbacks.insert(flow[0] + 1 if flow else 0, self)  # which decides what is logged
        self._is_attached = True
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Make the layers sparse and start, or go on from the checkpoint that was loaded."""
        _refuse_sharding(args)
        model, optimizer = kwargs["model"], plain_optimizer(kwargs["optimizer"])
        carried = take_carried(optimizer)
        if carried is not None and not (isinstance(carried, Mapping) and PRUNED_KEY in carried):
            raise ValueError(
                f"the checkpoint's optimizer.pt has a state of sparse training without {PRUNED_KEY!r}: it is "
                "damaged, so resume from another checkpoint."
            )
        if self.training is not None:  # an earlier run may have been interrupted
            self.training.finish(zeros=False)
        for clock in take_over(model):
            log.info("layers of a run that was interrupted at step %d go on from their dense weights.", clock)
        self._hooks.close()
        self._logged_clock = -1
        self.training = SparseTraining(
            model,
            optimizer,
            self.method,
            self._length(state, carried),
            self.targets,
            self.exclude,
            backend=self.backend,
            deterministic=self.deterministic,
            keep_transposed=self.keep_transposed,
            lr_schedulers=[kwargs["lr_scheduler"]],
            teacher=self.teacher,
            logits_from=self.logits_from,
            watch_dense=self.watch_dense,
            track_age=self.track_age,
            state=carried,
            verbose=False,
        )
        layers, merges = self.training.masks.layers, self.method.adapter_merge
        adapters = [part for pair in self.training.adapters().values() for part in pair]
        if carried is not None:
            try:
                restore_pruned_(layers, carried["codes"], carried[PRUNED_KEY])
                load_apart(optimizer, carried, adapters)
            except BaseException:
                self.training.finish(zeros=False)
                raise
        self._hooks.callback(CarriedState(optimizer, self._state, adapters).remove)
        self._hooks.enter_context(evaluated_in_state_dicts(layers.values(), merges))
        self._hooks.callback(model.register_load_state_dict_post_hook(self._note_load).remove)
        if state.is_world_process_zero:
            log.info(self.training.report.summary())
            if self.print_table:
                self.training.report.print_table()
            if args.report_to and not self._is_attached:
                warnings.warn(
                    f"metrics of sparse training do not reach {', '.join(args.report_to)}: call "
                    "HuggingFaceSparseTraining(...).attach(trainer) instead of giving the trainer the callback.",
                    stacklevel=2,
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Forget that weights were loaded; they are trained on now."""
        self._weights_loaded = False

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Clear the gradients of adapters, which ``model.zero_grad()`` does not know, after skipped steps as well."""
        for pair in self.training.adapters().values() if self.training is not None else ():
            for part in pair:
                part.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:  # fmt: skip
        """Follow the trainer's end, which skipped steps bring nearer, and have the trainer log after a refresh."""
        if self.training is not None and self.total_steps is None and self.method.needs_total:
            total_steps = self.training.clock + max(0, state.max_steps - state.global_step)
            if self.training.clock and total_steps != self.training.total_steps:
                self.training.retime(total_steps)
        if self.training is not None and self.training.refreshed and self.training.clock != self._logged_clock:
            control.should_log = control.should_log or args.logging_strategy != "no"
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Add what the last optimizer step changed to the trainer's own values."""
        training = self.training
        if training is None or training.finished or logs is None or "loss" not in logs:
            return
        if training.clock != self._logged_clock:
            self._logged_clock = training.clock
            values = {f"sparsity/{key}": value for key, value in training.metrics(self.per_layer_metrics).items()}
            logs.update(values)
            state.log_history[-1].update(values)  # the trainer has copied the values into it already

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Give plain layers back."""
        if self.training is None:
            return
        self._hooks.close()
        is_best = self._weights_loaded and args.load_best_model_at_end
        was_sparse = self.training.phase != "dense"
        self.training.finish(zeros=not is_best)
        if state.is_world_process_zero and self.training.ending is not None:
            log.info(str(self.training.ending))
            if not (self.training.ending.as_planned or is_best):
                warnings.warn(str(self.training.ending), stacklevel=2)
        if is_best and was_sparse and (dense := self._dense_layers(kwargs["model"])):
            warnings.warn(
                f"the best model, {state.best_model_checkpoint}, has {len(dense)} dense layers, such as {dense[0]!r}, "
                "as it was saved before they were pruned: set load_best_model_at_end=False to keep the sparse model.",
                stacklevel=2,
            )

    def _length(self, state: TrainerState, carried: dict[str, Any] | None) -> int | None:
        """Return the run's length; a run that resumes without a state has what is left of it."""
        left = state.max_steps - state.global_step
        if carried is None and state.global_step:
            warnings.warn(
                f"checkpoint has no state of sparse training, so its schedule starts now, at step {state.global_step} "
                f"of the trainer, and covers the {left} steps that are left.",
                stacklevel=3,
            )
        clock = 0 if carried is None else carried.get("clock")  # which steps that were skipped are not in
        return self.total_steps or (left + clock if self.method.needs_total and isinstance(clock, int) else None)

    def _state(self) -> dict[str, Any]:
        assert self.training is not None
        layers = self.training.masks.layers
        masters = {weight_key(name): layer.weight.detach() for name, layer in layers.items()}
        pruned = pruned_values(masters, layers, self.method.adapter_merge)
        return {**self.training.state_dict(), PRUNED_KEY: {name: values.cpu() for name, values in pruned.items()}}

    def _note_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self._weights_loaded = True

    def _dense_layers(self, model: nn.Module) -> list[str]:
        """Return the layers that were chosen to be sparse and have no zeros."""
        assert self.training is not None
        names = [choice.name for choice in self.training.report.sparse]
        return [name for name in names if bool(model.get_parameter(weight_key(name)).all())]


def _refuse_sharding(args: TrainingArguments) -> None:
    for name in ("deepspeed", "fsdp"):
        if value := getattr(args, name, None):
            raise ValueError(
                f"{name} is {value!r}: sparse training needs whole weights on every rank, so use data parallelism "
                "(torchrun) or one device."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"the trainer copies the model to {args.n_gpu} GPUs in one process, and the copies have no masks: start it "
            "with torchrun, or show it one GPU."
        )
