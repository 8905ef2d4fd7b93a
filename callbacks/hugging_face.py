"""``HuggingFaceSparseTraining``: sparse training in Hugging Face's ``Trainer``."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from sparsetrain.checkpoint import PRUNED_KEY, weight_key
from sparsetrain.checkpoint.carried_state import CarriedState, take_carried
from sparsetrain.checkpoint.sparse_weights import evaluated_in_state_dicts
from sparsetrain.distributed.shards import is_spread
from sparsetrain.distributed.wrappers import plain_optimizer
from sparsetrain.hardware.extras import require
from sparsetrain.methods import Method, resolve_method

from .sparse_run import SparseRun

require("transformers", "hf", "HuggingFaceSparseTraining")

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.trainer_callback import DefaultFlowCallback  # noqa: E402

log = logging.getLogger(__name__)


class HuggingFaceSparseTraining(SparseRun, TrainerCallback):
    """Train with 2:4 sparsity: add it to a ``transformers.Trainer``, change nothing else.

    The twin of :class:`SparseTrainingCallback`, with the same arguments but ``gather``, phases and metrics. The run's
    length comes from the trainer and follows it. After ``train()`` the layers are plain ones again, with zeros if the
    run ends sparse, and one line, ``callback.training.ending``, says what the model is. While it trains, everything
    that is saved from ``model.state_dict()`` is the sparse model: checkpoints, ``trainer.save_model()``,
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
        backend: Matmul backend, as in :func:`sparsetrain.sparsify_`.
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
        )
        self.method = resolve_method(method)
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

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the layers sparse and start, or go on from the checkpoint that was loaded."""
        _refuse_sharding(args, kwargs["model"])
        model, optimizer = kwargs["model"], plain_optimizer(kwargs["optimizer"])
        carried = _carried_state(optimizer)
        for said in self._take_over(model):
            log.info(said)
        self._hooks.close()
        self._logged_clock = -1
        training = self._begin(model, optimizer, self._length(state, carried), [kwargs["lr_scheduler"]], carried)
        self._hooks.callback(CarriedState(optimizer, self._carry).remove)
        layers = training.masks.layers.values()
        self._hooks.enter_context(evaluated_in_state_dicts(layers, self.method.adapter_merge))
        self._hooks.callback(model.register_load_state_dict_post_hook(self._note_load).remove)
        if state.is_world_process_zero:
            log.info(training.report.summary())
            if self.print_table:
                training.report.print_table()
            if args.report_to and not self._is_attached:
                warnings.warn(
                    f"metrics of sparse training do not reach {', '.join(args.report_to)}: call "
                    "HuggingFaceSparseTraining(...).attach(trainer) instead of giving the trainer the callback.",
                    stacklevel=2,
                )

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget that weights were loaded; they are trained on now."""
        self._weights_loaded = False

    @override
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the gradients of adapters, which ``model.zero_grad()`` does not know, after skipped steps as well."""
        for pair in self.training.adapters().values() if self.training is not None else ():
            for part in pair:
                part.grad = None

    @override
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Follow the trainer's end, which skipped steps bring nearer, and have the trainer log after a refresh."""
        if self.training is not None and self.total_steps is None and self.method.needs_total:
            total_steps = self.training.clock + max(0, state.max_steps - state.global_step)
            if self.training.clock and total_steps != self.training.total_steps:
                self.training.retime(total_steps)
        if self.training is not None and self.training.refreshed and self.training.clock != self._logged_clock:
            control.should_log = control.should_log or args.logging_strategy != "no"
        return control

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what the last optimizer step changed to the trainer's own values."""
        training = self.training
        if training is None or training.finished or logs is None or "loss" not in logs:
            return
        if training.clock != self._logged_clock:
            self._logged_clock = training.clock
            values = {f"sparsity/{key}": value for key, value in training.metrics(self.per_layer_metrics).items()}
            logs.update(values)
            state.log_history[-1].update(values)  # the trainer has copied the values into it already

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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

    def _carry(self) -> dict[str, Any]:
        assert self.training is not None
        layers = self.training.masks.layers
        return self._state({weight_key(name): layer.weight.detach() for name, layer in layers.items()})

    def _note_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self._weights_loaded = True

    def _dense_layers(self, model: nn.Module) -> list[str]:
        """Return the layers that were chosen to be sparse and have no zeros."""
        assert self.training is not None
        names = [choice.name for choice in self.training.report.sparse]
        return [name for name in names if bool(model.get_parameter(weight_key(name)).all())]


def _carried_state(optimizer: Optimizer) -> dict[str, Any] | None:
    carried = take_carried(optimizer)
    if carried is not None and not (isinstance(carried, Mapping) and PRUNED_KEY in carried):
        raise ValueError(
            f"the checkpoint's optimizer.pt has a state of sparse training without {PRUNED_KEY!r}: it is "
            "damaged, so resume from another checkpoint."
        )
    return carried


def _refuse_sharding(args: TrainingArguments, model: nn.Module) -> None:
    started = getattr(getattr(args, "distributed_state", None), "distributed_type", "")  # by accelerate's own command
    if args.deepspeed or started == "DEEPSPEED":
        raise ValueError(
            f"deepspeed is {args.deepspeed or 'on'!r}, but its optimizer steps flat partitions, which are none of the "
            "model's weights: use data parallelism (torchrun) or one device."
        )
    if args.fsdp or started == "FSDP" or any(map(is_spread, model.parameters())):
        what = f"fsdp is {args.fsdp!r}" if args.fsdp else "the model's weights are sharded"
        raise ValueError(
            f"{what}, but the trainer saves no optimizer.pt of sharded weights, where masks are kept: use data "
            "parallelism (torchrun), or SparseTrainingCallback with Lightning's ModelParallelStrategy."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"the trainer copies the model to {args.n_gpu} GPUs in one process, and the copies have no masks: start it "
            "with torchrun, or show it one GPU."
        )
