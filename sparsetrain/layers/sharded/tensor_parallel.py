"""Products under tensor parallelism: the part of a weight that lies here times the input's part, without a message."""

from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from ...distributed.shards import held, is_spread
from ..masked_layer import MaskedLayer
from ..products import multiply_part
from .gathered_products import gathered_linear, multiply_gathered


def sharded_linear(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply tokens ``[..., K]`` by the matrix of a layer whose weight is spread, and add the bias: ``[..., O]``."""
    return parallel_linear(layer, input) if is_spread(layer.weight) else gathered_linear(layer, input)


def parallel_linear(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply a DTensor by a weight that is one in the forward too, as plans of ``parallelize_module`` leave it.

    Cut by output features, every part has the whole input and makes its own features; cut by input features, it has
    its own and makes an addend of all outputs, to which the bias is added; as DTensor's own linear does.

    Args:
        layer: Whose mask is in force.
        input: ``[..., K]`` on the weight's mesh of one dimension, spread as the weight wants it or not.

    Returns:
        ``[..., O]``, a DTensor.

    Raises:
        RuntimeError: If the input is no DTensor on the weight's mesh.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    weight: Any = layer.weight
    mesh, last = weight.device_mesh, input.dim() - 1
    spread = _on_mesh(layer, input, mesh)
    (cut,), (own,) = weight.placements, spread.placements
    by_rows, by_columns = (cut.is_shard(dimension) for dimension in ((1, 0) if layer.transposed else (0, 1)))
    of_tokens = cut.is_replicate() and own.is_shard() and own.dim < last
    wanted = Shard(last) if by_columns else own if of_tokens else Replicate()
    if own != wanted:
        spread = spread.redistribute(mesh, (wanted,))
    part = spread.to_local(grad_placements=(Partial() if by_rows else wanted,))
    bias: Any = layer.bias
    inside = bias is not None and by_rows and is_spread(bias) and bias.placements[0].is_shard(0)
    if of_tokens:  # every process has tokens of its own, so gradients of the weight are added up
        held_weight = weight.redistribute(mesh, weight.placements).to_local(grad_placements=(Partial(),))
    else:
        held_weight = held(weight)
    multiply = multiply_part if weight is layer.shard.weight else multiply_gathered  # type: ignore[union-attr]
    number = mesh.get_local_rank() if by_rows else 0
    product = multiply(layer, part, held_weight, held(bias) if inside else None, number)
    placement = Shard(last) if by_rows else Partial() if by_columns else wanted
    shape = (*spread.shape[:-1], layer.matrix_shape[0])
    strides = tuple(accumulate((1, *reversed(shape[1:])), mul))[::-1]
    output: Tensor = DTensor.from_local(product, mesh, (placement,), shape=torch.Size(shape), stride=strides)
    return output if bias is None or inside else output + bias


def _on_mesh(layer: MaskedLayer, input: Tensor, mesh: Any) -> Any:
    """Return a layer's input, which has to be a DTensor on a mesh of one dimension."""
    name = "" if layer.shard is None else layer.shard.name
    who = f"layer {name or type(layer).__name__!r}"
    if mesh.ndim != 1:
        raise RuntimeError(f"{who} was called before its weight was gathered: call the module that FSDP2 manages.")
    if not is_spread(input) or input.device_mesh != mesh:  # type: ignore[attr-defined]
        raise RuntimeError(
            f"{who} has a weight that is a DTensor but an input that is none on its mesh: parallelize it by a plan "
            "(parallelize_module), or make the input one (DTensor.from_local)."
        )
    return input
