"""The weight gradient from an unbiased 2:4 estimate of the output gradient, so that it can run sparse too."""

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..backends.packing import Packed, operand_of_packed
from ..backends.padding import padded_tokens
from ..kernels.mvue import mvue
from .choices import choose
from .execution import Execution
from .operands import Operands
from .registry import operands_of

TOKENS = 128
"""Of which a number of tokens is made a multiple, so that it fits every backend."""

LAYER_SHIFT = 16
"""Bits of the counter that count backward passes within a step; the layer's number is above them."""


def draw_counter(layer: int, clock: int = 0, device: torch.device | None = None) -> Tensor:
    """Return a counter int64 ``[2]`` of a layer's draws: the clock, and the layer with its backward passes.

    Example:
        >>> draw_counter(3, clock=7).tolist()
        [7, 196608]
    """
    counter = torch.empty(2, dtype=torch.int64, device=device)
    renumber_(counter, layer, clock)
    return counter


def renumber_(counter: Tensor, layer: int, clock: int) -> None:
    """Start a step's draws of a layer, without waiting for the device.

    Example:
        >>> counter = draw_counter(0)
        >>> renumber_(counter, layer=1, clock=7)
        >>> counter.tolist()
        [7, 65536]
    """
    counter[0].fill_(clock)
    counter[1].fill_(layer << LAYER_SHIFT)


@torch.library.custom_op("sparsetrain::estimated_weight_gradient", mutates_args={"counter"})
def estimated_weight_gradient(
    output_gradient: Tensor, input: Tensor, codes: Tensor, counter: Tensor, seed: int, backend: str = "auto"
) -> Tensor:
    """Return an unbiased estimate of ``dYᵀ·X`` that uses two of every four tokens of each output feature.

    Args:
        output_gradient: dY, ``[T, O]``.
        input: X, ``[T, I]``, in the same dtype.
        codes: int16 ``[O/4, I/4]`` of the layer, whose decisions are used; they are not read.
        counter: int64 ``[2]``, as :func:`draw_counter` makes it; counted up by one, so that the next call draws again.
        seed: Key of the random numbers.
        backend: A backend's name, or ``"auto"``.

    Returns:
        ``[O, I]`` in the dtype of dY.

    Raises:
        ValueError: If the backend cannot run here, or a shape does not fit.

    Example:
        >>> gradient, x = torch.ones(16, 4), torch.ones(16, 8)
        >>> codes = torch.zeros(1, 2, dtype=torch.int16)
        >>> estimated_weight_gradient(gradient, x, codes, draw_counter(0), 0)[0, 0].item()  # all tokens are alike
        16.0

    Source: minimum-variance unbiased estimates of Chmiel et al. 2022, arXiv 2203.10991, as Hu et al. 2024,
    arXiv 2404.01847, use them for weight gradients.
    """
    packed = Packed(*mvue(padded_tokens(output_gradient, TOKENS), counter, seed, 0))
    counter[1].add_(1)
    tokens = padded_tokens(input, TOKENS)
    operands = operands_of(codes) or Operands(Execution(backend))
    shape = (output_gradient.shape[1], input.shape[1])
    choice = choose(operands, tokens, shape, False, "weight_gradient", backend)
    operand = operand_of_packed(BACKENDS[choice.backend], packed)
    return BACKENDS[choice.backend].product(operand, tokens.t(), None, choice.algorithm, transposed_output=True)


@estimated_weight_gradient.register_fake
def _(
    output_gradient: Tensor, input: Tensor, codes: Tensor, counter: Tensor, seed: int, backend: str = "auto"
) -> Tensor:
    return output_gradient.new_empty(output_gradient.shape[1], input.shape[1])
