"""Hooks on optimizers: change final gradients before a step, and count successful steps after it."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..kernels.torch_internals import makes_optimizer_state, register_first_post_hook

AdjustGradients = Callable[[Optimizer, "Tensor | None"], None]


class StepHooks:
    """Calls ``adjust`` with unscaled, clipped gradients before every step, and the others after it.

    Three callers are told apart. A plain loop calls ``step()``: gradients are final, so ``adjust`` runs at once.
    Lightning runs backward and clipping in a closure inside ``step(closure)``: the closure is wrapped, so ``adjust``
    runs at its end. A fused optimizer under a gradient scaler is called with scaled gradients and skips by itself:
    ``adjust`` is given the scale, and a step that found infinities is not counted.

    A step of zeros by which ``torch.distributed.checkpoint`` makes an optimizer's state is left alone.

    With several optimizers, the clock advances when each has stepped since the last advance.

    Args:
        optimizers: The optimizers to hang on.
        adjust: Called with the optimizer and the scale of its gradients (a scalar tensor, or None for 1).
        updated: Called with an optimizer right after each of its steps, before any hook that was there first, and
            with whether it has stepped: not if it was skipped.
        written: Called with an optimizer after each of its successful steps, in the order of hooks.
        advance: Called after each completed round of steps.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        adjust: AdjustGradients,
        updated: Callable[[Optimizer, bool], None],
        written: Callable[[Optimizer], None],
        advance: Callable[[], None],
    ) -> None:
        self._optimizers = list(optimizers)
        self._adjust = adjust
        self._updated = updated
        self._written = written
        self._advance = advance
        self.stepped: set[int] = set()
        self._is_made_up = False  # the step at hand: it makes room for a state that is loaded, and trains nothing
        self._is_skipped = False
        self._handles = [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before_step),
                register_first_post_hook(optimizer, self._after_update),
                optimizer.register_step_post_hook(self._after_step),
            )
        ]

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._is_made_up = not optimizer.state and _has_no_rate(optimizer) and makes_optimizer_state()
        if self._is_made_up:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            self._adjust(optimizer, getattr(optimizer, "grad_scale", None))
            return None

        def closure_then_adjust() -> Any:
            result = closure()
            self._adjust(optimizer, getattr(optimizer, "grad_scale", None))
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_adjust}
        return (args[0], closure_then_adjust, *args[2:]), kwargs

    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        self._is_skipped = found_inf is not None and bool(found_inf)
        if not self._is_made_up:
            self._updated(optimizer, not self._is_skipped)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_made_up or self._is_skipped:
            return
        self._written(optimizer)
        self.stepped.add(self._optimizers.index(optimizer))
        if len(self.stepped) == len(self._optimizers):
            self.stepped.clear()
            self._advance()


def _has_no_rate(optimizer: Optimizer) -> bool:
    return not any(float(group.get("lr", 1.0)) for group in optimizer.param_groups)


def owned_parameters(optimizer: Optimizer) -> set[int]:
    """Return the ids of an optimizer's parameters."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
