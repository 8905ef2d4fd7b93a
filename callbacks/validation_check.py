"""``ValidationCheck``: compares the first validation batch of a fit with what plain masked weights give."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from sparsetrain.kernels.torch_internals import COMPILED_CALL, COMPILED_MODULE
from sparsetrain.layers.selection.select_layers import sparse_layers
from sparsetrain.layers.verification import (
    blame,
    copied,
    difference,
    find_first,
    plain_weights,
    random_state,
    tensors_of,
    unchanged,
)


class ValidationCheck:
    """Warns once, naming the module, if what validation computes is not what the masks say.

    While a batch is validated, the modules with masked layers note the first call that does not come from one of them,
    run once more with plain masked weights, and compare. ``validation_step`` runs once, as ever; its own ``log`` is
    silent in the second run. What the module was when the batch ends is as if there had been one run.

    Example:
        >>> check = ValidationCheck()  # SparseTrainingCallback makes one for every fit
        >>> check.done
        False
    """

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._wrapped: list[tuple[dict[str, Any], str, Any]] = []

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch this batch, if it is the first with masks in force."""
        if self.done or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        layers = [layer for _, layer in sparse_layers(pl_module)]
        if any(layer.shard is not None for layer in layers):  # plain weights cannot stand for what is gathered
            return
        masked = any(layer.is_masked for layer in layers)
        if not masked or getattr(pl_module, "_compiler_ctx", None) is not None:  # whose steps are compiled as a whole
            return
        self.done, self._depth = True, 0
        for name, module in _holders(pl_module):
            held = vars(module)
            key = COMPILED_CALL if held.get(COMPILED_CALL) is not None else "forward"
            self._wrapped.append((held, key, held.get(key)))
            held[key] = self._watch(name, module, getattr(module, key))

    def end(self) -> None:
        """Give the modules their own forwards back."""
        for held, key, before in self._wrapped:
            if before is None:
                held.pop(key, None)
            else:
                held[key] = before
        self._wrapped.clear()

    def _watch(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        seen = False

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            if self._depth or seen:
                return forward(*args, **kwargs)
            seen, self._depth = True, 1
            try:
                return self._compare(name, module, forward, args, kwargs)
            finally:
                self._depth = 0

        return watched

    def _compare(
        self, name: str, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            example, state = copied((args, kwargs)), random_state(module)
        except Exception as error:
            output = forward(*args, **kwargs)
            return self._give_up(error, output)
        output = forward(*args, **kwargs)

        def run() -> Any:
            positional, named = copied(example)
            if isinstance(module, LightningModule):
                vars(module).update(log=_ignore, log_dict=_ignore)
            return forward(*positional, **named)

        try:
            real = tensors_of(output)
            with unchanged(module, state), plain_weights(module):
                largest, ok = difference(real, tensors_of(run()))
            if ok:
                return output
            with unchanged(module, state):
                repeated = difference(real, tensors_of(run()))[1]
            if repeated:  # otherwise it is random, or depends on what came before
                first, uncalled = find_first(module, run, state)
                modules, layers = ([f"{name}.{inner}".strip(".") for inner in found] for found in (first, uncalled))
                rank_zero_warn(
                    "validation does not compute what the masks say: outputs differ from those of plain masked weights "
                    f"by a relative {largest:.1e}, {blame(modules or [name], layers)}."
                )
        except Exception as error:
            return self._give_up(error, output)
        return output

    def _give_up(self, error: Exception, output: Any) -> Any:
        rank_zero_warn(f"validation was not compared with plain masked weights, because the second run fails: {error}")
        return output


def _holders(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules around masked layers, from the outside; what is compiled is one module."""
    if not any(layer is not module for _, layer in sparse_layers(module)):
        return
    yield name, module
    if not hasattr(module, COMPILED_MODULE) and vars(module).get(COMPILED_CALL) is None:
        for key, child in module.named_children():
            yield from _holders(child, f"{name}.{key}".strip("."))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
