"""``SparseTraining``: the engine that runs a method's schedule on a model, from the optimizer's own steps."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checks.rules import FLAG, require
from ..distributed.agreement import device_of, together
from ..distributed.shards import local
from ..layers.claims import claim
from ..layers.conversion import write_zeros_
from ..layers.masked_layer import MaskedLayer
from ..layers.options import LayerOptions, check_owners
from ..layers.selection.select_layers import weight_count
from ..layers.selection.wrapped_names import warn_of_unmerged
from ..layers.sharded.gathering import GatherMode
from ..layers.sparsify import give_back_
from ..masks.matrices import matrix_of
from ..methods.method import Method
from ..methods.resolve import resolve_method
from ..modifiers.base import Setup
from .construction import assemble, facts_of, looked_at, make_sparse_, setup_of
from .ending import Progress, ending
from .saved_run import SavedRun
from .saved_state import described_in


class SparseTraining(SavedRun):
    """Sparse training in the user's own loop: make it after the optimizer, then train as before.

    It hangs on the optimizer, so a successful optimizer step is the only clock: accumulation, skipped steps,
    evaluation and recomputation do not count. In every step, gradients that are unscaled and clipped get the masked
    decay (sparse phase) or the mask (frozen phase); after it, the clock advances, the phase follows the schedule,
    frozen masks are applied to the weights again, and masks that are due are searched.

    Args:
        model: Any module; changed in place. Layers are named as in the plain model, whatever wraps it.
        optimizer: The optimizer that owns the model's weights, or several; Accelerate's and Fabric's wrappers too.
        method: A preset's name, a :class:`Method`, or a mapping of a preset's arguments.
        total_steps: Optimizer steps of the whole run, as ``clock`` counts them; needed if the schedule has fractions.
            With several optimizers, rounds in which each that owns sparse layers has stepped at least once.
        targets: Which layers become sparse, as in :func:`sparsetrain.select_layers`.
        exclude: Which do not.
        backend: Matmul backend, as in :func:`sparsetrain.sparsify_`.
        deterministic: With ``"auto"``, choose one verified algorithm a layer by name instead of by time.
        keep_transposed: Keep Wᵀ packed between steps; False packs it in every backward and saves 9/16 of a 16-bit
            weight.
        lr_schedulers: Needed by methods that restart the learning-rate schedule.
        teacher: With a method that distils, who teaches; put into evaluation mode. None copies the module that gives
            the logits when masks come into force first, from its dense weights.
        logits_from: With a method that distils, name of the submodule that gives the logits; "" is the model itself.
        watch_dense: Search masks in dense phases as well, without applying them, to log how often they would flip.
        track_age: Keep the age of every mask entry (one byte a weight).
        group: Processes that hold the same weights and average their gradients, such as the replicas of a pipeline's
            stage; None for all. Sharded weights know their own.
        gather: What FSDP2 gathers of a weight whose mask is in force: ``"masked"``, the weight with zeros;
            ``"packed"``, what is kept and one byte a tile; ``"auto"``, packed where products are sparse. The report
            says which.
        state: What an earlier :meth:`state_dict` returned, to go on from there; as good as :meth:`load_state_dict`
            afterwards, without a first mask search. Or what returns it, given this object, whose
            :meth:`sharded_state_dict` can be loaded into then; every process has to do the same in there.
        verbose: Print the one-line summary of the selection and, at :meth:`finish`, what the model is then.

    Raises:
        ValueError: If a value is not allowed, a target matches nothing, a trainable weight is in no optimizer, masks
            are searched before the criterion can have statistics, the state is of another model, or another process
            sets up another run. The model is left as it was.
        RuntimeError: If the run cannot be set up in another process.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> training = SparseTraining(model, optimizer, total_steps=12, verbose=False)
        >>> for _ in range(12):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(4, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> training.clock, training.phase
        (12, 'sparse')
        >>> training.finish()
        >>> print(training.ending)
        ends 2:4: 50.0 % zeros in 2 layers

        A preset with other values, for one layer; and on from a state:

        >>> method = {"preset": "fst", "warmup": 2, "dense_tail": 2}
        >>> training = SparseTraining(model, optimizer, method, 12, targets=["0"], verbose=False)
        >>> training.timeline.starts
        (0, 2, 10)
        >>> state = training.state_dict()  # to be saved beside those of the model and the optimizer
        >>> training.finish(zeros=False)
        >>> training = SparseTraining(model, optimizer, method, 12, targets=["0"], state=state, verbose=False)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        method: str | Method | Mapping[str, Any] = "recommended",
        total_steps: int | None = None,
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        *,
        backend: str = "auto",
        deterministic: bool = False,
        keep_transposed: bool = True,
        lr_schedulers: Sequence[LRScheduler] = (),
        teacher: nn.Module | None = None,
        logits_from: str = "",
        watch_dense: bool = True,
        track_age: bool = False,
        group: ProcessGroup | None = None,
        gather: GatherMode = "auto",
        state: Mapping[str, Any] | Callable[[Self], Mapping[str, Any]] | None = None,
        verbose: bool = True,
    ) -> None:
        self._everyone, trained = looked_at(model, group)
        with ExitStack() as undo:
            with together(self._everyone, "the run", device_of(model)) as note:
                check_owners(model, optimizer, lr_schedulers)
                require("verbose", verbose, FLAG)
                options = LayerOptions(targets, exclude, backend, deterministic, keep_transposed)
                self._given, self._verbose = resolve_method(method), verbose
                chosen = self._given.chosen(trained)
                setup = setup_of(
                    model, optimizer, chosen, lr_schedulers, total_steps=total_steps, teacher=teacher,
                    logits_from=logits_from, watch_dense=watch_dense, track_age=track_age, group=group, gather=gather,
                )  # fmt: skip
                self._start(setup, options, state is not None, undo)
                note(lambda: {**facts_of(setup, self.masks.layers), "goes on": state is not None})
            self._begin(state)
            undo.pop_all()
        if verbose:
            print(self.report.summary())

    def _start(self, setup: Setup, options: LayerOptions, resumes: bool, undo: ExitStack) -> None:
        """Make the layers sparse and put together what trains them."""
        self.model = setup.model
        self._selection, layers = make_sparse_(setup, options, resumes)
        undo.callback(give_back_, self.model, layers.values(), zeros=False)
        self._removals = undo.enter_context(ExitStack())  # of everything that hangs on the model and the optimizers
        self._weight_count = weight_count(self.model.modules())
        self._assemble(setup, layers)

    def _assemble(self, setup: Setup, layers: Mapping[str, MaskedLayer]) -> None:
        """Put together what trains sparse layers by the setup's method."""
        self._setup, self.method = setup, setup.method
        start = self._given.choice_in_words(self.method)
        self._selection = replace(self._selection, start=start, lr_factor=self.method.lr_factor)
        self._phases, self._steps = assemble(setup, layers, self._removals)
        self._steps.run, self.masks = self, self._phases.masks

    def _begin(self, state: Mapping[str, Any] | Callable[[Self], Mapping[str, Any]] | None) -> None:
        """Enter the first phase, or go on from a state; what is sent between processes begins here."""
        if state is None:
            self._phases.enter()
        else:
            found = state(self) if callable(state) else state
            if self._follow(found) and callable(state):
                found = state(self)  # what this method has room for
            self._resume(found, stacklevel=5)
        claim(self.masks.layers.values(), self)

    def _follow(self, state: Any) -> bool:
        method = self._given.chosen_like(described_in(state))
        if method is None or method == self.method:
            return False
        self._removals.close()
        timeline = method.schedule.resolve(self.total_steps)
        setup = self._setup._replace(method=method, timeline=timeline, total_steps=self.total_steps)
        self._assemble(setup, self.masks.layers)
        return True

    def distilled(self, loss: Tensor) -> Tensor:
        """Mix what the teacher says about the last batch into a loss: ``(1 - share)·loss + share·T²·KL``.

        Call it once for every backward, before the loss is divided for accumulation or scaled. It runs the teacher on
        the arguments of the last training forward of ``logits_from``. In dense phases, without gradients, and with a
        method that does not distil, it returns the loss itself.

        Args:
            loss: The task's loss, a scalar.

        Returns:
            A scalar, at least in float32.

        Raises:
            RuntimeError: If no training forward of ``logits_from`` was seen since the last call, or it gave no logits:
                a tensor, or ``logits`` in a mapping or object. An optimizer's step raises it as well, if the method
                distils and this was not called since the last step.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> method = {"preset": "dense_to_sparse_finetune", "distillation": 0.67}
            >>> training = SparseTraining(model, optimizer, method, total_steps=12, verbose=False)
            >>> loss = nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.arange(4))
            >>> training.distilled(loss).backward()
            >>> training.metrics()["distillation"] > 0
            True
        """
        for modifier in self._phases.modifiers:
            loss = modifier.mixed(loss)
        return loss

    def refresh(self) -> None:
        """Search masks now, whatever the schedule says."""
        self._phases.refresh()
        self._phases.repack_()

    def finish(self, *, zeros: bool = True) -> None:
        """Remove the hooks and give plain layers back; metrics and state stay readable, ``ending`` says what is left.

        Args:
            zeros: Write zeros into what is pruned if the run ends sparse; False keeps the dense masters.

        Warns:
            UserWarning: If merging peft's adapters later would fill the zeros.
        """
        if self.finished:
            return
        run, layers = self._phases.run, self.masks.layers
        if zeros:
            warn_of_unmerged(self.model, {name: layers[name] for name in sorted(run.active)})
        self._final = self.metrics(per_layer=True), self.state_dict()
        transposed = {name for name, layer in layers.items() if layer.transposed}
        filled = [modifier.finish(run) for modifier in self._phases.modifiers] if zeros else []
        merged = any(filled)
        self._removals.close()
        run.groups.forget()
        give_back_(self.model, layers.values(), zeros and not merged)
        weights = {name: matrix_of(local(layer.weight.detach()), name in transposed) for name, layer in layers.items()}
        progress = Progress(self.method, run.timeline, run.clock, run.total_steps)
        self.ending = ending(weights, run.active, progress, zeros, merged)
        if self._verbose:
            print(self.ending)

    def retime(self, total_steps: int | None) -> None:
        """Set the length of the whole run: phases that have begun stay, later ones move.

        Args:
            total_steps: Of the clock, from its step 0; None if unknown, and what waits for a fraction of it does wait.

        Raises:
            ValueError: If the run has taken more steps already.

        Example:
            >>> import torch
            >>> model = nn.Linear(8, 8)
            >>> training = SparseTraining(model, torch.optim.SGD(model.parameters()), "asp_one_shot", 100)
            sparse layers: 1 of 1 || sparse weights: 64 of 64 (100.0 %) || pattern: transposable 2:4
            >>> training.retime(20)
            >>> training.timeline.starts
            (0, 10)
        """
        self._phases.retime(total_steps)

    def apply_masks_(self) -> None:
        """Bring weights back under their masks after something else wrote them, as merging adapters does.

        Frozen masks write their zeros again, after :meth:`finish` as well; masks that move leave the masters as they
        are. Weights are packed again.
        """
        if self._final is not None:
            write_zeros_({name: self.masks.layers[name] for name in self._final[1]["active"]}, self._final[1]["codes"])
            return
        run = self._phases.run
        run.groups.forget()
        if run.phase == "frozen":
            self._phases.apply_masks_(run.active)
        for layer in self.masks.layers.values():
            layer.operands.invalidate()
        self._phases.repack_()
