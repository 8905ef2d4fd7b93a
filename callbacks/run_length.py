"""``RunLength``: how many steps of the clock a fit takes in all, from the trainer's limits and the pace so far."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import Trainer

from sparsetrain.methods.schedule import UNKNOWN_LENGTH
from sparsetrain.training import SparseTraining

RUN_LENGTH = "run_length"
"""Where the state of sparse training holds that of a ``RunLength``."""


@dataclass(frozen=True)
class Position:
    """Where a fit begins: after how many epochs and steps of the trainer, and whether in a checkpoint."""

    epoch: int
    step: int
    resumed: bool = False

    @classmethod
    def of(cls, trainer: Trainer) -> "Position":
        """Return where a trainer stands before a fit."""
        return cls(trainer.current_epoch, trainer.global_step)

    @classmethod
    def in_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "Position":
        """Return where a trainer will stand that has read its loops from a Lightning checkpoint."""
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        epoch = loop["epoch_progress"]["current"]["processed"] if loop else checkpoint["epoch"]
        return cls(int(epoch), int(checkpoint["global_step"]), resumed=True)


class RunLength:
    """Translates a trainer's end, in epochs and in optimizer steps, into the clock of sparse training.

    The clock counts rounds of successful steps of the optimizers that own sparse layers; the trainer counts every
    optimizer's steps and every batch, since its first fit. With automatic optimization the two differ by a constant
    and by skipped steps. With manual optimization the training step decides how many rounds a batch makes: that is
    measured at the ends of batches in which the clock went on, and unknown until the first of them.

    Args:
        trainer: In a fit.
        position: Where the fit begins.

    Example:
        >>> trainer = Trainer(max_steps=100, logger=False, enable_checkpointing=False, accelerator="cpu")
        >>> RunLength(trainer, Position(0, 100)).nothing_left
        True
    """

    def __init__(self, trainer: Trainer, position: Position) -> None:
        self._trainer = trainer
        self._position = position
        self._origin: list[int] | None = None  # clock, batches and the trainer's steps, from where rounds are counted
        self._seen: int | None = None  # clock at the last estimate
        self._told: int | None = None  # what was returned last

    @property
    def nothing_left(self) -> bool:
        """Whether the fit will train no step."""
        trainer = self._trainer
        steps = trainer.max_steps != -1 and self._position.step >= trainer.max_steps
        epochs = trainer.max_epochs
        return steps or (epochs is not None and 0 <= epochs <= self._position.epoch) or trainer.limit_train_batches == 0

    @property
    def is_measured(self) -> bool:
        """Whether it depends on what the training step does."""
        return not self._trainer.lightning_module.automatic_optimization

    def at_start(self, state: Mapping[str, Any] | None) -> int:
        """Return the steps of the whole run, as far as they are known before its first batch.

        Args:
            state: Of sparse training, in the checkpoint that the fit goes on from.

        Raises:
            MisconfigurationException: If the trainer has no end.
            ValueError: If the state is damaged.
        """
        saved = None if state is None else state.get("total_steps")
        if state is None or not isinstance(saved, int):
            return self._of_a_new_run() or UNKNOWN_LENGTH
        if not self.load_state_dict(state.get(RUN_LENGTH) or {}):
            rank_zero_warn("resuming with another end of the trainer: phases that have not begun follow it.")
        return saved

    def follow(self, training: SparseTraining, running: bool) -> None:
        """Have a run end where the trainer ends, seen from between two batches.

        Args:
            training: The engine.
            running: Whether the loop counts the batch that comes next already.

        Raises:
            MisconfigurationException: If the trainer has no end.
            ValueError: If the phases do not fit into a run that has not begun.
        """
        total_steps = self._at_batch(training.clock, running)
        if total_steps:
            if not training.clock:
                training.method.schedule.resolve(total_steps)
            training.retime(total_steps)

    def _of_a_new_run(self) -> int | None:
        """Return the steps that this fit will take, if every batch makes every optimizer step; None if unknown yet."""
        trainer = self._trainer
        endless = trainer.max_epochs in (None, -1)
        if self._position.resumed and not endless:
            return None  # how many batches there are is known once the loop has loaded them where it left off
        if not endless:
            _ = trainer.estimated_stepping_batches  # loads them
        return self._finite(self._left(self._position.epoch, 0, self._position.step))

    def _at_batch(self, clock: int, running: bool) -> int | None:
        """Return the steps of the whole run, seen from between two batches; None if there is nothing new to say."""
        trainer, loop = self._trainer, self._trainer.fit_loop
        batches, batch, step = loop.total_batch_idx + 1 - running, loop.batch_idx + 1 - running, trainer.global_step
        if self._origin is None:
            self._origin = [clock, batches, step]
        start, first_batch, first_step = self._origin
        if not self.is_measured:
            return self._news(clock + self._finite(self._left(trainer.current_epoch, batch, step)))
        rounds, passed, taken = clock - start, batches - first_batch, step - first_step
        each = taken / passed if passed and taken else float("inf")
        left = self._finite(self._left(trainer.current_epoch, batch, step, each))
        if left == 0:
            return self._news(clock)
        if rounds <= 0 or clock == self._seen:
            return None
        if self._seen is None:  # from the end of the first round on, so that it does not matter when in it we began
            self._origin = [clock, batches, step]
        self._seen = clock
        return self._news(clock + left * rounds // passed)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next estimate depends on, as plain numbers."""
        return {"origin": self._origin, "seen": self._seen, "end": self._end}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on measuring; return whether the trainer ends where it was to end when the state was saved.

        Raises:
            ValueError: If the state is damaged.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"checkpoint's run_length is {state!r}: it must be a dict; the checkpoint is damaged.")
        origin, seen = state.get("origin"), state.get("seen")
        whole = origin is None or (isinstance(origin, list) and len(origin) == 3)
        if not whole or not all(type(number) is int for number in [*(origin or ()), seen or 0]):
            raise ValueError(
                f"checkpoint's run_length has origin {origin!r} and seen {seen!r}: they must be None or three ints, "
                "and None or an int; the checkpoint is damaged."
            )
        self._origin, self._seen = origin, seen
        return bool(state.get("end") == self._end)

    @property
    def _end(self) -> list[float]:
        trainer = self._trainer
        return [trainer.max_steps, -1 if trainer.max_epochs is None else trainer.max_epochs]

    def _finite(self, left: float) -> int:
        if left < float("inf"):
            return int(left)
        trainer = self._trainer
        raise MisconfigurationException(
            f"trainer has max_steps={trainer.max_steps} and max_epochs={trainer.max_epochs}, so the run has no length, "
            "but the method has fractions of it: set max_steps, or SparseTrainingCallback(total_steps=...)."
        )

    def _news(self, total: int) -> int | None:
        if total == self._told:
            return None
        self._told = total
        return total

    def _left(self, epoch: int, batch: int, step: int, each: float | None = None) -> float:
        """Return what is left of the run: optimizer steps, or batches with manual optimization.

        Args:
            epoch: Epochs that are over.
            batch: Batches of this one that are over.
            step: The trainer's steps so far.
            each: With manual optimization, the trainer's steps in a batch; None for one of every optimizer.
        """
        trainer = self._trainer
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        steps = float("inf") if trainer.max_steps == -1 else trainer.max_steps - step
        whole, passed = batches, float(batch)
        if self.is_measured:
            each = max(1, len(trainer.optimizers)) if each is None else each
            steps = math.ceil(steps / each) if steps < float("inf") > each else steps
        else:
            every = trainer.accumulate_grad_batches
            whole = batches if batches == float("inf") else math.ceil(batches / every)
            passed = whole if batch >= batches else batch // every
        if epochs is None or epochs == -1 or batches == float("inf"):
            return max(0, steps)
        return max(0, min(steps, (epochs - epoch) * whole - passed))
