"""``MetricLog``: metrics of sparse training in every logger, at each mask search and at the trainer's logging steps."""

from lightning.pytorch import LightningModule, Trainer
from torch import tensor

from sparsetrain.training import SparseTraining


class MetricLog:
    """Writes to the loggers itself, as Lightning's own monitors do: what a module logs waits for the logging steps.

    Args:
        training: The engine, after it was made or its state was loaded.
        per_layer: Log the metrics of every layer too.
        resumed: Its last mask search was logged by the run that it goes on from.

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
    ``sparsity/decay``                     λ of the masked decay in the next step; 0 where nothing is pulled
    ``sparsity/distillation``              T²·KL from the teacher on the last batch, in nats, of a method that distils
    ``sparsity/clock``                     successful optimizer steps
    =====================================  =========================================================================
    """

    def __init__(self, training: SparseTraining, per_layer: bool, resumed: bool) -> None:
        self._training = training
        self._per_layer = per_layer
        self._clock = training.clock
        self._refresh = training.last_refresh if resumed else -1

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log once what an optimizer step changed; nothing where a batch made none.

        A search before the first step is logged with that step.
        """
        training = self._training
        stepped, searched = training.clock != self._clock, training.last_refresh != self._refresh
        self._clock = training.clock
        # while gradients accumulate, every batch of a logging step is one to Lightning
        if not stepped or not (searched or trainer._logger_connector.should_update_logs):
            return
        self._refresh = training.last_refresh
        values = {f"sparsity/{key}": value for key, value in training.metrics(self._per_layer).items()}
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        scalars = {key: tensor(value, device=trainer.strategy.root_device) for key, value in values.items()}
        trainer.logged_metrics.update(scalars)
        flip_rate = scalars.pop("sparsity/flip_rate", None)
        trainer.callback_metrics.update(scalars)
        if flip_rate is not None:
            pl_module.log("sparsity/flip_rate", flip_rate, on_step=True, on_epoch=False, prog_bar=True, logger=False)
