"""Products of masked linear layers: the quick way in eager execution, and through autograd's own everywhere else."""

import torch.nn.functional as F
from torch import Tensor

from ..matmul.eager import is_eager
from ..matmul.transforms import as_constants
from .eager_linear import eager_product
from .functional import sparse_linear
from .masked_layer import MaskedLayer


def multiply(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply tokens ``[..., K]`` by a masked layer's matrix, add bias and adapter: ``[..., O]``."""
    output = eager_product(layer, input) if is_eager(input) else None
    if output is None:
        output = _multiply(layer, input, layer.thresholded_matrix(), layer.bias)
    if layer.adapter is None:
        return output
    down, up = as_constants(layer.adapter)
    return output + F.linear(F.linear(input, down), up)


def multiply_part(layer: MaskedLayer, input: Tensor, weight: Tensor, bias: Tensor | None, number: int = 0) -> Tensor:
    """Multiply tokens by the part of a layer's matrix that lies here, masked, and add a bias.

    Args:
        layer: Whose weight is a DTensor.
        input: ``[..., K]`` of the part, plain.
        weight: The part, as the graph of gradients knows it.
        bias: ``[O]`` of the part, plain, or None.
        number: Of the part, among those that make random draws of their own.
    """
    quick = is_eager(input) and (layer.draws is None or not number)
    output = eager_product(layer, input, (layer.master, weight, bias)) if quick else None
    if output is None:
        output = _multiply(layer, input, layer.thresholded_matrix(layer.as_matrix(weight)), bias, number)
    return output


def _multiply(layer: MaskedLayer, input: Tensor, matrix: Tensor, bias: Tensor | None, number: int = 0) -> Tensor:
    execution = layer.execution
    return sparse_linear(
        input,
        matrix,
        layer.mask_codes,
        bias,
        gradient=layer.gradient,
        backend=layer.backend,
        transposable=execution.transposable,
        draws=layer.draws,
        seed=execution.seed + number,
        backward_codes=layer.backward_codes,
    )
