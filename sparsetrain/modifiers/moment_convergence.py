"""Second moments of Adam: a dense head may end when they have settled, as masks then train under a steady scale."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks.rules import NOT_NEGATIVE, mapping, optional, sequence, whole
from ..checks.states import refuse_missing, require_part
from ..distributed.shards import copies, local
from ..distributed.wrappers import is_zero
from ..layers.masked_layer import MaskedLayer
from ..layers.sharded.totals import processes, sum_over_mesh
from .base import Modifier, Resumed, Run, Setup, Step

ASK_EVERY = 10
"""Steps between two questions to the device."""


class SecondMoments(Modifier):
    """Watches how much ``v`` changes in a step: the mean of ``|v_t - v_{t-1}|`` over the entries of all layers.

    They have settled when the mean over the last ``1 / (1 - β₂)`` steps, or over all there were, is below Adam's ε.

    Args:
        layers: Name to layer.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4, 4))
        >>> optimizer = torch.optim.Adam([weight])
        >>> moments = SecondMoments()
        >>> moments.observe(optimizer, [weight], [torch.full((4, 4), 1e-4)], None)
        >>> moments.commit()
        >>> moments.settled(clock=10)  # v moves by 1e-11
        True

    Source: Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with Precondition", ICML 2023,
    arXiv 2302.01172, first option.
    """

    name = "moments"

    def __init__(self, layers: Mapping[str, MaskedLayer] | None = None) -> None:
        self._layers = layers or {}
        self._pending: list[tuple[Tensor, int]] = []
        self._changes: Tensor | None = None  # ring
        self._count = 0
        self._epsilon = 0.0

    @classmethod
    def check(cls, setup: Setup) -> None:
        """Raise ``ValueError`` unless the optimizers have second moments."""
        if setup.timeline.earliest:
            require_second_moments(setup.optimizers)

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for schedules whose dense head may end early."""
        return cls(run.layers) if run.timeline.earliest else None

    def before_step(self, run: Run, step: Step) -> None:
        """Note the change that a step of the dense head is about to make."""
        if run.phase == "dense":
            self.forget()
            weights = [run.layers[name].weight for name in step.gradients]
            self.observe(step.optimizer, weights, list(step.gradients.values()), step.scale)

    def after_step(self, run: Run) -> None:
        """End the dense head if it may end, and the moments have settled."""
        if run.phase == "dense":
            self.commit()
            if run.timeline.may_end_at(run.clock) and self.settled(run.clock):
                run.timeline = run.timeline.ended_at(run.clock)

    @torch.no_grad()
    def observe(
        self, optimizer: Optimizer, weights: list[Tensor], gradients: list[Tensor], scale: Tensor | None
    ) -> None:
        """Note the change that a step is about to make; it may still be skipped.

        Args:
            optimizer: An Adam.
            weights: Its layers'.
            gradients: Final but for ``scale``.
            scale: By which gradients are multiplied, if they are.
        """
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        count = processes(self._layers)
        for weight, gradient in zip(weights, gradients, strict=True):
            group = groups[id(weight)]
            beta, self._epsilon = group["betas"][1], group["eps"]
            square = (gradient if scale is None else gradient / scale.to(gradient.device)).float().square()
            before = optimizer.state.get(weight, {}).get("exp_avg_sq")
            before = None if before is None else local(before)
            change = square if before is None else square - before
            share = (1 - beta) / copies(weight, count)
            self._pending.append((share * change.abs().sum(dtype=torch.float64), weight.numel()))
            window = max(1, round(1 / (1 - beta)))
            if self._changes is None or self._changes.numel() != window:
                self._changes, self._count = torch.zeros(window, dtype=torch.float64, device=gradient.device), 0

    def commit(self) -> None:
        """Count what was noted: the step succeeded."""
        if not self._pending or self._changes is None:
            return
        total = torch.stack([change.to(self._changes.device) for change, _ in self._pending]).sum()
        self._changes[self._count % self._changes.numel()] = total / sum(entries for _, entries in self._pending)
        self._count += 1
        self._pending.clear()

    def forget(self) -> None:
        """Drop what was noted of a step that was skipped."""
        self._pending.clear()

    def settled(self, clock: int) -> bool:
        """Return whether the moments have settled; asks the device every ten steps, and is False in between."""
        if self._changes is None or not self._count or clock % ASK_EVERY:
            return False
        seen = min(self._count, self._changes.numel())
        return float(sum_over_mesh(self._layers, self._changes).sum()) / seen < self._epsilon

    def state_dict(self) -> dict[str, Any]:
        """Return the window."""
        return {
            "changes": None if self._changes is None else sum_over_mesh(self._layers, self._changes).tolist(),
            "count": self._count,
            "epsilon": self._epsilon,
        }

    def check_state(self, state: Any, resumed: Resumed) -> None:
        """Raise ``ValueError`` if a state is damaged; changes nothing."""
        if state is None and resumed.same:
            refuse_missing(self.name)
        changes = sequence(NOT_NEGATIVE, allowed="a list of at least one number", least=1)
        rule = mapping({"changes": optional(changes), "count": whole(), "epsilon": NOT_NEGATIVE})
        require_part(self.name, state, optional(rule))

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take back what :meth:`state_dict` returned; None leaves what was seen."""
        if state is None:
            return
        changes, device = state["changes"], next((layer.master.device for layer in self._layers.values()), None)
        self._changes = None if changes is None else torch.tensor(changes, dtype=torch.float64, device=device)
        if self._changes is not None:
            self._changes /= processes(self._layers)
        self._count, self._epsilon = int(state["count"]), float(state["epsilon"])


def require_second_moments(optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` unless every optimizer has second moments, as Adam and AdamW have.

    Example:
        >>> require_second_moments([torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])])
    """
    for optimizer in optimizers:
        if is_zero(optimizer):
            raise ValueError(
                "optimizer is ZeroRedundancyOptimizer but the dense head ends when second moments have settled, of "
                "which each process holds a share: use Adam or AdamW themselves, or a phase without 'earliest'."
            )
        if any("betas" not in group or "eps" not in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer is {type(optimizer).__name__} but the dense head ends when second moments have settled: "
                "use Adam or AdamW, or a phase without 'earliest'."
            )
