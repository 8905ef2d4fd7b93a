"""``Observer``: shows a criterion the gradients and inputs of successful optimizer steps, and nothing else.

Inputs pass three stations. A forward with gradients reduces its input to a summary; whether the layer is in training
mode does not matter, because models are fine-tuned in evaluation mode as well. The backward of the layer's output adds
the summary to ``passing``, so forwards without a backward do not count. The weight's gradient, which comes once per
backward and after that, moves ``passing`` into ``gathered``, which starts again where the weight has no gradient yet:
what a skipped step left behind is forgotten.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..criteria.criterion import Criterion
from ..distributed.peers import ALONE, Peers
from ..distributed.shards import is_spread
from ..layers.masked_layer import MaskedLayer
from ..layers.sharded.alignment import parallel_too_late
from .base import Modifier, Run, Setup, Step
from .inputs import InputHook
from .sums import summed


class Observer(Modifier):
    """Calls a criterion's ``observe_*`` methods; a criterion that needs nothing costs nothing.

    Args:
        criterion: What gathers statistics.
        layers: Layer name to layer.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> from ..criteria.registry import resolve_criterion
        >>> layer = SparseLinear(8, 4)
        >>> observer = Observer(resolve_criterion("wanda"), {"fc": layer})
        >>> observer.attach()
        >>> layer(torch.eye(8)).sum().backward()
        >>> observer.note({"fc": layer.weight.grad}, None)
        >>> observer.count()
        >>> observer.detach()
        >>> torch.allclose(observer.criterion.state_dict()["running"]["fc"], torch.tensor(0.1))
        True
    """

    name = "criterion_observer"

    def __init__(self, criterion: Criterion, layers: Mapping[str, MaskedLayer]) -> None:
        self.criterion = criterion
        self.layers = dict(layers)
        self._passing: dict[str, Tensor] = {}
        self._gathered: dict[str, Tensor] = {}
        self._last: dict[str, Tensor | None] = {}  # the gradient at the last backward, where weights are spread
        self._handles: dict[str, list[RemovableHandle]] = {}  # of the forward, then of the weight if it is trained

    @classmethod
    def of(cls, run: Run, setup: Setup) -> Self | None:
        """Return it for criteria that need anything but weights."""
        return cls(run.criterion, run.layers) if run.criterion.needs else None

    def attach(self) -> None:
        """Hang on the layers if inputs are needed; before the model is compiled."""
        if "input" not in self.criterion.needs or self._handles:
            return
        for name, layer in self.layers.items():
            columns = min(layer.matrix.shape[1], layer.input_features)
            summary = self.summarize(layer.master.new_zeros(1, columns))
            self._passing[name], self._gathered[name] = torch.zeros_like(summary), torch.zeros_like(summary)
            self._handles[name] = [layer.register_forward_hook(InputHook(self, name), with_kwargs=True)]
            self._hang_on_weight(name)

    def follow(self, name: str, old: Tensor, new: Tensor) -> None:
        """Hang on a layer's new weight."""
        if name in self._handles:
            self._hang_on_weight(name)

    def _hang_on_weight(self, name: str) -> None:
        for handle in self._handles[name][1:]:
            handle.remove()
        del self._handles[name][1:]
        weight = self.layers[name].weight
        if not weight.requires_grad:
            return
        if is_spread(weight):  # its gradient is no autograd engine's
            hook = partial(self._gather_spread, name)
            self._handles[name].append(weight.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        else:
            self._handles[name].append(weight.register_hook(partial(self._gather, name)))  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Take the hooks off the layers."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()

    def before_step(self, run: Run, step: Step) -> None:
        """Note the step."""
        self.note(step.gradients, step.scale, run.peers)

    def after_step(self, run: Run) -> None:
        """Count what was noted."""
        self.count(run.peers)

    def note(self, gradients: Mapping[str, Tensor], scale: Tensor | None, peers: Peers = ALONE) -> None:
        """Note an optimizer's step that may still be skipped; under data parallelism, every rank must come here.

        Args:
            gradients: Name to final gradient of that optimizer's layers: clipped, with nothing added.
            scale: What the gradients are multiplied by, a scalar tensor; None for 1.
            peers: Processes that see other inputs and must find the same masks.
        """
        if "gradient" in self.criterion.needs:
            for name, gradient in gradients.items():
                layer = self.layers[name]
                self.criterion.observe_gradient(name, layer.matrix, layer.as_matrix(gradient), scale)
        if self._passing:
            self._hand_over(gradients, peers)

    def count(self, peers: Peers = ALONE) -> None:
        """Count what was noted: the step succeeded, of every optimizer if there are several."""
        if self._passing:
            frozen = [name for name, layer in self.layers.items() if not layer.weight.requires_grad]
            self._hand_over(frozen, peers)
        if self.criterion.needs:
            self.criterion.observe_step()

    def gathers(self, layer: nn.Module) -> bool:
        """Return that inputs always count."""
        return True

    def summarize(self, input: Tensor) -> Tensor:
        """Return what the criterion keeps of an input."""
        return self.criterion.summarize_input(input)

    def passing(self, name: str, summary: Tensor) -> Tensor:
        """Return the total of a layer's inputs whose backward ran, to which summaries are added in place."""
        if self._passing[name].shape != summary.shape:
            raise RuntimeError(parallel_too_late(name))
        if self._passing[name].device != summary.device:  # the model moved
            self._passing[name] = self._passing[name].to(summary.device)
            self._gathered[name] = self._gathered[name].to(summary.device)
        return self._passing[name]

    def _gather_spread(self, name: str, weight: Tensor) -> None:
        if weight.grad is not self._last.get(name):
            self._gathered[name].zero_()
        self._last[name] = weight.grad
        self._add_passing(name)

    def _gather(self, name: str, gradient: Tensor) -> None:
        if self.layers[name].weight.grad is None:
            self._gathered[name].zero_()
        self._add_passing(name)

    @torch.no_grad()
    def _add_passing(self, name: str) -> None:
        self._gathered[name].add_(self._passing[name])
        self._passing[name].zero_()

    @torch.no_grad()
    def _hand_over(self, names: Iterable[str], peers: Peers) -> None:
        names = [name for name in names if name in self._passing]
        totals = [self._gathered[name] + self._passing[name] for name in names]
        for name, total in zip(names, summed(totals, peers), strict=True):
            self.criterion.observe_input(name, total)
            self._gathered[name].zero_()
            self._passing[name].zero_()
