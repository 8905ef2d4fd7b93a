"""``SparseRun``: what trainers' callbacks share: arguments, the engine made of them, and its state in checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sparsetrain.checkpoint import PRUNED_KEY, pruned_values
from sparsetrain.layers.claims import take_over
from sparsetrain.layers.options import check_options
from sparsetrain.layers.sharded.gathering import GatherMode
from sparsetrain.methods import Method
from sparsetrain.training import SparseTraining


@dataclass(eq=False, repr=False, kw_only=True)
class SparseRun:
    """A run of sparse training in somebody's trainer, whose callback tells it when to begin.

    All arguments of the callbacks but ``method``, which they resolve.

    Raises:
        TypeError: If targets or excludes are no strings.
        ValueError: If another value is not allowed.
    """

    method: Method = field(init=False)
    targets: str | list[str]
    exclude: str | list[str] | tuple[str, ...]
    backend: str
    deterministic: bool
    keep_transposed: bool
    total_steps: int | None
    watch_dense: bool
    track_age: bool
    per_layer_metrics: bool
    print_table: bool
    logits_from: str
    teacher: nn.Module | None
    gather: GatherMode = "auto"

    def __post_init__(self) -> None:
        check_options(**{entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init})
        self.training: SparseTraining | None = None
        self._hooks = ExitStack()  # of what hangs on the model and the optimizer beside the engine

    def _take_over(self, model: nn.Module) -> list[str]:
        """Finish what an interrupted run has left, on this model or another; return what is to be said of this one."""
        if self.training is not None:
            self.training.finish(zeros=False)
        return [
            f"layers of a run that was interrupted at step {clock} go on from their dense weights."
            for clock in take_over(model)
        ]

    def _begin(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        total_steps: int | None,
        lr_schedulers: Sequence[LRScheduler],
        state: Mapping[str, Any] | Callable[[SparseTraining], Mapping[str, Any]] | None,
    ) -> SparseTraining:
        """Make the layers sparse and start, or go on from a state."""
        self.training = SparseTraining(
            model,
            optimizer,
            self.method,
            total_steps,
            self.targets,
            self.exclude,
            backend=self.backend,
            deterministic=self.deterministic,
            keep_transposed=self.keep_transposed,
            lr_schedulers=lr_schedulers,
            teacher=self.teacher,
            logits_from=self.logits_from,
            watch_dense=self.watch_dense,
            track_age=self.track_age,
            gather=self.gather,
            state=state,
            verbose=False,
        )
        return self.training

    def _state(self, masters: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a checkpoint holds of the run beside the sparse model, of which these are the dense weights."""
        assert self.training is not None
        pruned = pruned_values(masters, self.training.masks.layers, self.method.adapter_merge)
        return {**self.training.state_dict(), PRUNED_KEY: {name: values.cpu() for name, values in pruned.items()}}
