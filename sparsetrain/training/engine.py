"""``SparseTraining``: the engine that runs a method's schedule on a model, from the optimizer's own steps."""

import copy
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..criteria import resolve_criterion
from ..distributed.wrappers import plain_model, plain_optimizer
from ..layers.claims import claim
from ..layers.conversion import write_zeros_
from ..layers.layer_group import LayerGroups
from ..layers.masked_layer import MaskedLayer
from ..layers.options import check_options, check_owners
from ..layers.selection.select_layers import SelectionReport, select_layers, sparse_layers, weight_count
from ..layers.selection.wrapped_names import warn_of_unmerged
from ..layers.sparsify import give_back_, sparsify_
from ..layers.verification import VerificationReport, verify
from ..masks.gradient_rules import resolve_gradient_rule
from ..masks.matrices import matrix_of
from ..masks.patterns import resolve_pattern
from ..methods.method import Method
from ..methods.presets import resolve_method
from ..methods.schedule import UNKNOWN_LENGTH, Timeline
from ..modifiers.base import Entry, Modifier, Run, Setup, Step
from ..modifiers.registry import modifiers_of
from ..types import PhaseKind
from .ending import Ending, Progress, ending
from .mask_metrics import mask_metrics
from .mask_state import MaskState
from .masters import Masters
from .setup_checks import STATE_VERSION, check_setup, check_statistics
from .state_checks import check_state, saved_timeline
from .state_versions import in_this_version
from .step_hooks import StepHooks, owned_parameters
from .timing import StepTimer


class SparseTraining:
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
        backend: Matmul backend: a name, or ``"auto"`` (the default): the fastest verified one, benchmarked here;
            without a GPU that is ``"masked"``.
        deterministic: With ``"auto"``, choose one verified algorithm a layer by name instead of by time.
        keep_transposed: Keep Wᵀ packed between steps; False packs it in every backward and saves 9/16 of a 16-bit
            weight.
        lr_schedulers: Needed by methods that restart the learning-rate schedule.
        teacher: With a method that distils, who teaches; put into evaluation mode. None copies the module that gives
            the logits when masks come into force first, from its dense weights.
        logits_from: With a method that distils, name of the submodule that gives the logits; "" is the model itself.
        watch_dense: Search masks in dense phases as well, without applying them, to log how often they would flip.
        track_age: Keep the age of every mask entry (one byte a weight).
        state: What an earlier :meth:`state_dict` returned, to go on from there; as good as :meth:`load_state_dict`
            afterwards, without a first mask search.
        verbose: Print the one-line summary of the selection and, at :meth:`finish`, what the model is then.

    Raises:
        ValueError: If a value is not allowed, a target matches nothing, a trainable weight is in no optimizer, masks
            are searched before the criterion can have statistics, or the state is of another model. The model is left
            as it was.

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
        state: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        check_owners(model, optimizer, lr_schedulers)
        self.method = resolve_method(method)
        check_options(
            targets=targets, exclude=exclude, backend=backend, total_steps=total_steps, logits_from=logits_from,
            teacher=teacher, deterministic=deterministic, keep_transposed=keep_transposed, watch_dense=watch_dense,
            track_age=track_age, verbose=verbose,
        )  # fmt: skip
        self.model = model = plain_model(model)
        self.ending: Ending | None = None
        self.timer: StepTimer | None = None
        self._verbose, self._watch_dense = verbose, watch_dense
        optimizers = list(map(plain_optimizer, [optimizer] if isinstance(optimizer, Optimizer) else optimizer))
        timeline = self.method.schedule.resolve(total_steps)
        setup = Setup(model, self.method, timeline, optimizers, lr_schedulers, teacher, logits_from)
        report = select_layers(model, targets, exclude, self.method.pattern)
        check_setup(setup, report, total_steps, watch_dense, backend)
        if state is None:
            check_statistics(report, self.method)
        self._report = sparsify_(
            model, targets, exclude, pattern=self.method.pattern, backend=backend, deterministic=deterministic,
            keep_transposed=keep_transposed, weight_product=self.method.weight_product, phase="dense", verbose=False,
        )  # fmt: skip
        layers = dict(sparse_layers(model))
        own = {choice.name: layers[choice.name] for choice in self._report.sparse}
        self._removals = ExitStack()  # of everything that hangs on the model and the optimizers
        try:
            self._set_up(setup, own, total_steps, track_age)
            if state is None:
                self._enter()
            else:
                self.load_state_dict(state)
        except BaseException:
            self._removals.close()
            give_back_(model, own.values(), zeros=False)
            raise
        claim(own.values(), self)
        if verbose:
            print(self._report.summary())

    def _set_up(
        self, setup: Setup, layers: Mapping[str, MaskedLayer], total_steps: int | None, track_age: bool
    ) -> None:
        method = self.method
        self._last_refresh = -1
        self._repack_ms = 0.0
        self._final: tuple[dict[str, float], dict[str, Any]] | None = None
        criterion = copy.deepcopy(resolve_criterion(method.criterion))  # its statistics are this run's
        tile_budget = method.dense_budget if method.mixes_tiles else 0.0
        pattern = resolve_pattern(method.pattern)
        self.masks = MaskState(layers, pattern, criterion, track_age, method.hysteresis, tile_budget)
        self._weight_count = weight_count(self.model.modules())
        weights = {id(layer.weight) for layer in layers.values()}
        own = [entry for entry in setup.optimizers if owned_parameters(entry) & weights] or list(setup.optimizers)
        self._masters = Masters(self.model, layers, own)
        self._run = Run(method, self.masks.layers, own, criterion, LayerGroups(), setup.timeline, total_steps)
        self._masked: set[str] = set()  # frozen layers that optimizers have masked themselves since the clock moved
        self._modifiers: list[Modifier] = []
        for modifier in modifiers_of(self._run, setup):
            self._modifiers.append(modifier)
            self._removals.callback(modifier.detach)
            modifier.attach()
        self._run.groups.number_draws_(self.masks.layers, self.clock)
        self._hooks = StepHooks(own, self._adjust_gradients, self._written, self._advance)
        self._removals.callback(self._hooks.remove)

    @property
    def clock(self) -> int:
        """Optimizer steps taken."""
        return self._run.clock

    @property
    def phase(self) -> PhaseKind:
        """The phase of the clock: dense, sparse or frozen."""
        return self._run.phase

    @property
    def timeline(self) -> Timeline:
        """When phases begin, in steps."""
        return self._run.timeline

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None if unknown."""
        return self._run.total_steps

    @property
    def report(self) -> SelectionReport:
        """Every linear and convolutional layer: sparse, with its products' backends, or dense, with the reason."""
        return self._report if self.finished else self._report.with_products(self.masks.layers)

    @property
    def sparse_flops_share(self) -> float:
        """Share of the layers' GEMM FLOPs that can run sparse now, if all have as many tokens."""
        layers = self.masks.layers.values()
        active = sum(layer.weight.numel() for layer in layers if layer.is_masked and layer.has_sparse_products)
        products = self.masks.pattern.sparse_products + (self.method.weight_product == "mvue")
        return products * active / (3 * self._weight_count)

    @property
    def refreshed(self) -> bool:
        """Whether the last step ended with a mask search."""
        return self._last_refresh == self.clock

    @property
    def last_refresh(self) -> int:
        """The clock at the last mask search, in optimizer steps; -1 before the first."""
        return self._last_refresh

    def metrics(self, per_layer: bool = False) -> dict[str, float]:
        """Measure the masks and what they keep.

        Args:
            per_layer: Add ``layer/<name>/flip_rate``, ``layer/<name>/kept_fraction_at_refresh`` and
                ``layer/<name>/<field of PruneMetrics>``.

        Returns:
            Always: ``clock`` (steps), ``sparse_layers`` (whose mask is in force), ``sparse_flops_share`` (of the
            layers' GEMMs, if all have as many tokens), ``violations`` (must be 0), ``refresh_ms`` and ``repack_ms``
            (host time of the last search, and of packing after the last step), ``operand_bytes`` (packed weights on
            the device); ``decay`` (λ) and ``distillation`` (T²·KL on the last batch, nats) if there is one. Once a mask
            exists: the fields of :class:`PruneMetrics`; ``kept_fraction_at_refresh``, of every layer's master as the
            last search of its mask saw it, as frozen masks zero what they prune; ``flip_rate`` and
            ``virtual_flip_rate``, the fraction of entries that changed at the last refresh of a sparse or dense phase;
            ``flip_rate_ratio``, the first over the second; ``age_mean`` (refreshes).
        """
        if self._final is not None:
            return {key: value for key, value in self._final[0].items() if per_layer or not key.startswith("layer/")}
        values: dict[str, float | None] = {
            "clock": self.clock,
            "sparse_layers": sum(layer.is_masked for layer in self.masks.layers.values()),
            "sparse_flops_share": self.sparse_flops_share,
            "violations": self.masks.violations(),
            "refresh_ms": self.masks.refresh_ms,
            "repack_ms": self._repack_ms,
            "operand_bytes": sum(layer.operands.bytes for layer in self.masks.layers.values()),
        }
        for modifier in self._modifiers:
            values.update(modifier.metrics())
        if self.masks.exists:
            values.update(mask_metrics(self.masks, per_layer))
        return {key: float(value) for key, value in values.items() if value is not None}

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
            >>> for _ in range(12):
            ...     optimizer.zero_grad()
            ...     loss = nn.functional.cross_entropy(model(torch.randn(4, 8)), torch.arange(4))
            ...     training.distilled(loss).backward()
            ...     optimizer.step()
            >>> training.metrics()["distillation"] > 0
            True
        """
        for modifier in self._modifiers:
            loss = modifier.mixed(loss)
        return loss

    def verify(self, example: Any) -> VerificationReport:
        """Compare the model as it runs with the same model with plain masked weights, as :func:`sparsetrain.verify`."""
        return verify(self.model, example)

    def refresh(self) -> None:
        """Search masks now, whatever the schedule says."""
        self._refresh()
        self._repack()

    def _refresh(self, names: set[str] | None = None) -> None:
        with nullcontext() if self.timer is None else self.timer.part("refresh"):
            self._search(names)

    def _search(self, names: set[str] | None) -> None:
        counted = self.phase == "sparse" and bool(self.masks.flips)
        self.masks.refresh(self.clock, virtual=self.phase == "dense", names=names)
        self._last_refresh = self.clock
        for modifier in self._modifiers if counted else ():  # not at a phase's first, whose flips are the dense one's
            modifier.after_search(self.masks.flip_rate_ratio)

    def finish(self, *, zeros: bool = True) -> None:
        """Remove the hooks and give plain layers back; metrics and state stay readable, ``ending`` says what is left.

        Args:
            zeros: Write zeros into what is pruned if the run ends sparse; False keeps the dense masters.

        Warns:
            UserWarning: If merging peft's adapters later would fill the zeros.
        """
        if self.finished:
            return
        if zeros:
            warn_of_unmerged(self.model, {name: self.masks.layers[name] for name in sorted(self._run.active)})
        self._final = self.metrics(per_layer=True), self.state_dict()
        masked, transposed = (
            {*self._run.active},
            {name for name, layer in self.masks.layers.items() if layer.transposed},
        )
        merged = self._restore(zeros)
        layers = self.masks.layers.items()
        weights = {name: matrix_of(layer.weight.detach(), name in transposed) for name, layer in layers}
        progress = Progress(self.method, self.timeline, self.clock, self.total_steps)
        self.ending = ending(weights, masked, progress, zeros, merged)
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
        if total_steps is not None and total_steps < self.clock:
            raise ValueError(f"total_steps is {total_steps} but {self.clock} steps are taken: pass at least as many.")
        length = UNKNOWN_LENGTH if total_steps is None else total_steps
        run = self._run
        run.timeline = run.timeline.retimed(self.method.schedule.resolve(length, cut=True), run.clock)
        run.total_steps = run.total_steps if total_steps is None else total_steps
        if not self._enter():
            self._tell_of_phase(Entry(resumed=True))
        self._repack()

    def apply_masks_(self) -> None:
        """Bring weights back under their masks after something else wrote them, as merging adapters does.

        Frozen masks write their zeros again, after :meth:`finish` as well; masks that move leave the masters as they
        are. Weights are packed again.
        """
        if self._final is not None:
            write_zeros_({name: self.masks.layers[name] for name in self._final[1]["active"]}, self._final[1]["codes"])
            return
        self._run.groups.forget()
        if self.phase == "frozen":
            self._apply_masks()
        for layer in self.masks.layers.values():
            layer.operands.invalidate()
        self._repack()

    @property
    def finished(self) -> bool:
        """Whether :meth:`finish` was called."""
        return self._final is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers, strings and tensors; save it beside the model and the optimizer."""
        if self._final is not None:
            return copy.deepcopy(self._final[1])
        parts = [(modifier.name, modifier.state_dict()) for modifier in self._modifiers]
        return {
            "version": STATE_VERSION,
            "clock": self.clock,
            "total_steps": self.total_steps,
            "method": self.method.describe(),
            "stepped": sorted(self._hooks.stepped),
            "last_refresh": self._last_refresh,
            "active": sorted(self._run.active),
            "starts": list(self.timeline.starts),
            "modifiers": {name: part for name, part in parts if part is not None},
            **self.masks.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: clock, phase, masks and statistics; weights and optimizers are the caller's.

        Raises:
            ValueError: If the state is damaged or of another model; nothing is changed then.
        """
        if self.finished:
            raise ValueError("training is finished: pass the state to a new SparseTraining(..., state=...).")
        run, total_steps, state = self._run, self.total_steps, in_this_version(state)
        check_state(state, self.masks, self._modifiers, run, len(run.optimizers))
        self.masks.load_state_dict(state)
        run.groups.forget()
        for layer in self.masks.layers.values():
            layer.operands.invalidate()
        run.clock, run.active = state["clock"], frozenset(state["active"])
        self._last_refresh = state["last_refresh"]
        self._hooks.stepped = set(state["stepped"])
        run.timeline = saved_timeline(state, self.method, run.timeline)
        for modifier in self._modifiers:
            modifier.load_state_dict(state["modifiers"].get(modifier.name))
        self._report_budget()
        self._set_phase(Entry(resumed=True))
        run.groups.number_draws_(self.masks.layers, run.clock)
        self._repack()
        if state["total_steps"] != total_steps:
            self.retime(None if total_steps is None else max(total_steps, self.clock))

    def _adjust_gradients(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        """Item 1 of a step: gradients are unscaled (or ``scale`` says by how much they are not) and clipped."""
        for name, (old, new) in self._masters.follow(optimizer).items():
            for modifier in self._modifiers:
                modifier.follow(name, old, new)
            self._run.groups.forget()
        step = Step(optimizer, self._masters.gradients(optimizer), scale)
        for modifier in self._modifiers:
            modifier.before_step(self._run, step)

    def _written(self, optimizer: Optimizer) -> None:
        """A step of one of several optimizers: packed weights of its layers that it did not pack are out of date."""
        left = self._masters.layers_of(optimizer)
        for modifier in self._modifiers:
            packed, masked = modifier.after_update(optimizer)
            self._masked.update(masked)
            left = {name: layer for name, layer in left.items() if name not in packed} if packed else left
        self._run.groups.invalidate(left, repacks=len(self._run.optimizers) == 1)

    def _advance(self) -> None:
        """Item 3 of a step: clock, phase, frozen masks, refresh, repack."""
        run = self._run
        run.clock += 1
        for modifier in self._modifiers:
            modifier.after_step(run)
        entered, moment = self._enter(), object()
        due = not entered and run.age % self.method.refresh_every == 0
        if run.phase == "frozen" and not entered:
            self._apply_masks(self._masked, moment)
            if due:
                self.masks.refresh_backward()
        elif due and (run.phase == "sparse" or (self._watch_dense and self.masks.is_observed)):
            self._refresh()
        self._repack(moment)
        run.groups.number_draws_(self.masks.layers, run.clock)

    def adapters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the low-rank adapters: layer name to down ``[r, I]`` and up ``[O, r]``; empty if there are none."""
        return {name: pair for modifier in self._modifiers for name, pair in modifier.adapters().items()}

    def _enter(self) -> bool:
        """Enter the phase of the clock; return False if the run is in it."""
        run = self._run
        if run.timeline.index_at(run.clock) == run.phase_index:
            return False
        kind, _ = run.timeline.at(run.clock)
        kept = run.timeline.kept_at(run.clock)
        goes_on = kind == "frozen" and run.phase != "dense" and kept == self.masks.kept
        held = run.active if goes_on else frozenset()  # their masks stay
        searched = set(self.masks.maskable) - held
        for modifier in self._modifiers:
            modifier.leave_phase(run, kind, kept != self.masks.kept)
        run.phase, self.masks.kept = kind, kept  # what a search finds, and counts flips as
        if searched and (kind != "dense" or (self._watch_dense and self.masks.is_observed)):
            self._refresh(searched if held else None)
        run.active = frozenset() if kind == "dense" else frozenset(self._choose_active(set(held)))
        self._set_phase(Entry(resumed=False, fresh=run.active - held))
        if kind == "frozen":
            self._apply_masks()
        return True

    def _choose_active(self, held: set[str]) -> set[str]:
        """Return the layers whose masks are in force: those that are, then those that lose the least magnitude."""
        if self.masks.dense is None:
            by_layers = self.method.dense_budget if self.method.dense_unit == "layers" else 0.0
            self.masks.keep_dense_(self.masks.costliest_layers(self.clock, by_layers) if by_layers else ())
            self._report_budget()
        return self.masks.least_costly_layers(held, self.timeline.share_at(self.clock))

    def _report_budget(self) -> None:
        reason = f"kept dense by dense_budget={self.method.dense_budget:g}"
        self._report = self._report.with_dense(self.masks.dense or (), reason)

    def _restore(self, zeros: bool) -> bool:
        """Give plain layers back; return whether modifiers have filled what was pruned."""
        filled = [modifier.finish(self._run) for modifier in self._modifiers] if zeros else []
        self._removals.close()
        self._run.groups.forget()
        give_back_(self.model, self.masks.layers.values(), zeros and not any(filled))
        return any(filled)

    def _set_phase(self, entry: Entry) -> None:
        run = self._run
        run.phase, run.phase_start = run.timeline.at(run.clock)
        run.phase_index = run.timeline.index_at(run.clock)
        rule = resolve_gradient_rule(self.method.frozen_gradient if run.phase == "frozen" else self.method.gradient)
        for name, layer in self.masks.layers.items():
            layer.phase, layer.gradient = run.phase if name in run.active else "dense", rule
            layer.is_2_4 = self.masks.kept == 2 and not self.masks.tile_budget
            layer.operands.managed = True
            if layer.phase == "dense" or not layer.is_2_4:
                layer.operands.release()
        self._tell_of_phase(entry)

    def _tell_of_phase(self, entry: Entry) -> None:
        for modifier in self._modifiers:
            modifier.enter_phase(self._run, entry)

    def _apply_masks(self, done: Collection[str] = (), moment: object = None) -> None:
        if self.method.frozen_in_place:
            run = self._run
            layers = run.groups.chosen(run.layers, run.active.difference(done) if done else run.active)
            for group in run.groups.of(layers):
                group.apply_masks_(group.weights, moment)
        self._masked.clear()

    def _repack(self, moment: object = None) -> None:
        if self.timer is None:
            self._repack_ms = self._run.groups.repack_(self.masks.layers, moment)
            return
        with self.timer.part("repack"):
            self._repack_ms = self._run.groups.repack_(self.masks.layers, moment)
