"""``SavedFit``: what Lightning's checkpoints hold of a fit with sparse training, and how a fit goes on from them."""

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sparsetrain.checkpoint import CHECKPOINT_KEY, PRUNED_KEY, require_pruned
from sparsetrain.checkpoint.sparse_weights import sparse_state_dict

from .model_parallel import (
    Parts,
    is_in_shards,
    is_model_parallel,
    put_shards_,
    state_from_shards,
    state_in_parts,
)
from .run_length import RUN_LENGTH, Position, RunLength
from .sparse_run import SparseRun


class SavedFit(SparseRun, Callback):
    """A run of sparse training in Lightning's trainer, with its part in checkpoints."""

    def _forget(self) -> None:
        """Know of no fit."""
        self._hooks.close()
        self.training = None
        self._loaded: dict[str, Any] | None = None  # state in the checkpoint that the fit begins from
        self._position: Position | None = None  # there
        self._length: RunLength | None = None
        self._final: dict[str, Any] | None = None  # parts of every checkpoint that is saved after the fit
        self._final_shards: dict[str, Any] = {}  # and what of them is saved in shards

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the layers sparse and start, or go on from the checkpoint that was loaded."""
        raise NotImplementedError

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a checkpoint that is saved after the fit needs to resume, before layers are plain again."""
        assert self.training is not None
        if is_model_parallel(trainer):
            weights = trainer.strategy.lightning_module_state_dict()
            copies = {key: value.to("cpu", copy=True) for key, value in weights.items()}
            state, self._final_shards = self._in_parts(pl_module, copies)
        else:
            state = self._state(pl_module.state_dict())
        self._final = {CHECKPOINT_KEY: state}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the sparse model into ``state_dict`` and everything else under ``checkpoint["sparsetrain"]``."""
        if self._final is not None:
            checkpoint.update(self._final)
            put_shards_(checkpoint, self._final_shards)
        elif self.training is None or self.training.finished:
            return
        elif is_model_parallel(trainer):
            checkpoint[CHECKPOINT_KEY], shards = self._in_parts(pl_module, checkpoint["state_dict"])
            put_shards_(checkpoint, shards)
        else:
            masters = checkpoint["state_dict"]
            checkpoint[CHECKPOINT_KEY] = state = self._state(masters)
            if state[PRUNED_KEY]:
                merge = self.method.adapter_merge
                checkpoint["state_dict"] = sparse_state_dict(pl_module, masters, merge_adapters=merge)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state for ``on_fit_start``; if a fit is running (learning-rate finder), go back to it at once."""
        if trainer.state.fn != "fit":
            self._final = None  # the weights are the checkpoint's now, not those of the last fit
            return
        self._position = Position.in_checkpoint(checkpoint)
        state = checkpoint.get(CHECKPOINT_KEY)
        late = is_model_parallel(trainer)  # the strategy has taken the weights out of the checkpoint, and loaded them
        if not is_in_shards(state):
            require_pruned(state, pl_module.state_dict() if late else checkpoint["state_dict"])
        if state is None:
            rank_zero_warn(
                f"checkpoint has no {CHECKPOINT_KEY!r} state, so sparse training starts at step 0 of its schedule."
            )
        elif self.training is not None and not self.training.finished:
            in_shards = is_in_shards(state)
            self.training.load_state_dict(state_from_shards(trainer, self.training, state) if in_shards else state)
            return
        self._loaded = state
        if late:
            self._start(trainer, pl_module)

    @override
    def _state(self, masters: Mapping[str, Any]) -> dict[str, Any]:
        return {**super()._state(masters), **self._length_state()}

    def _in_parts(self, module: LightningModule, weights: dict[str, Any]) -> Parts:
        assert self.training is not None
        state, shards = state_in_parts(self.training, module, weights)
        return {**state, **self._length_state()}, shards

    def _length_state(self) -> dict[str, Any]:
        return {RUN_LENGTH: None if self._length is None else self._length.state_dict()}
