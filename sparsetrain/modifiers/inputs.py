"""Sums over the tokens of layers' inputs, of forwards whose backward runs, wherever the inputs lie."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.shards import is_spread, local
from ..layers.masked_layer import MaskedLayer
from ..layers.sharded.tensor_parallel import prepared


class Gatherer(Protocol):
    """What adds up summaries of inputs."""

    @property
    def layers(self) -> Mapping[str, MaskedLayer]:
        """By name."""

    def gathers(self, layer: nn.Module) -> bool:
        """Return whether a layer's inputs count now; compiled graphs ask again if the layer's attributes change."""

    def summarize(self, input: Tensor) -> Tensor:
        """Return an input's summary, a sum over its tokens."""

    def passing(self, name: str, summary: Tensor) -> Tensor:
        """Return the total to which a layer's summary is added in place."""


class InputHook:
    """Reduces the input of forwards with gradients at once, so that no activation is kept, and adds it in the backward.

    Under activation checkpointing the graph of only one of the two forwards is run backward, in training or evaluation
    mode, so each input counts once. Copied or pickled with its layer, it does nothing.
    """

    def __init__(self, gatherer: Gatherer | None = None, name: str = "") -> None:
        self.gatherer = gatherer
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return InputHook, ()

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Return the output, or None to leave it as it is."""
        gatherer, name = self.gatherer, self.name
        if gatherer is None or not (torch.is_grad_enabled() and output.requires_grad and gatherer.gathers(layer)):
            return None
        own = gatherer.layers[name]
        input = own.features_last(args[0] if args else kwargs["input"])
        summary = summed_over_tokens(own, input.detach(), gatherer.summarize)
        if torch.compiler.is_compiling():  # where tensors inside the graph take no hooks
            return _AddInBackward.apply(output, summary, gatherer.passing(name, summary))  # type: ignore[no-untyped-call, no-any-return]

        def add(gradient: Tensor) -> None:
            gatherer.passing(name, summary).add_(summary)

        output.register_hook(add)  # type: ignore[no-untyped-call]
        return None


class _AddInBackward(torch.autograd.Function):
    """The identity; its backward adds a summary to a total."""

    @staticmethod
    def forward(output: Tensor, summary: Tensor, total: Tensor) -> Tensor:
        return output.clone()  # a view could not be written in place by what follows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.total = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None, None]:
        ctx.total.add_(ctx.saved_tensors[0])
        return gradients[0], None, None


def summed_over_tokens(layer: MaskedLayer, input: Tensor, summarize: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a sum over the tokens of all processes, of the features that lie here.

    Args:
        layer: Whose input it is.
        input: ``[..., I]``.
        summarize: Makes the sum of a plain tensor.

    Example:
        >>> from sparsetrain import SparseLinear
        >>> summed_over_tokens(SparseLinear(4, 4), torch.ones(3, 4), lambda tokens: tokens.sum(0)).tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if not is_spread(input):
        return summarize(input)
    spread = prepared(layer, input)
    total = summarize(local(spread))
    if spread.placements[0].is_shard() and spread.placements[0].dim < input.dim() - 1:
        dist.all_reduce(total, group=spread.device_mesh.get_group())
    return total
