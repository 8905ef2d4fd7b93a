"""Products under tensor parallelism: the part of a weight that lies here times the input's part, without a message."""

from itertools import accumulate
from operator import mul
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...distributed.shards import is_spread, to_local
from ..masked_layer import MaskedLayer
from ..products import multiply_part
from .gathered_products import gathered_linear, multiply_gathered


def sharded_linear(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply tokens ``[..., K]`` by a layer's matrix that is spread, add bias and adapter: ``[..., O]``."""
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
    from torch.distributed.tensor import DTensor, Partial, Shard

    weight, bias = cast(Any, layer.weight), cast(Any, layer.bias)
    spread = prepared(layer, input)
    mesh, (own,), by_rows = spread.device_mesh, spread.placements, _is_cut(layer, by_rows=True)
    of_tokens = not by_rows and own.is_shard() and own.dim < input.dim() - 1
    part = spread.to_local(grad_placements=(Partial(),) if by_rows else None)
    # where every process has tokens of its own, the gradient of the weight is a sum over them
    own_weight = weight.to_local(grad_placements=(Partial(),) if of_tokens else None)
    by_columns = _is_cut(layer, by_rows=False)
    inside = bias is not None and by_rows and is_spread(bias) and bias.placements[0].is_shard(0)
    multiply = multiply_part if weight is layer.shard.weight else multiply_gathered  # type: ignore[union-attr]
    number = mesh.get_local_rank() if by_rows else 0
    product = multiply(layer, part, own_weight, to_local(bias) if inside else None, number)
    if layer.adapter is not None:
        down, up = _adapter_here(layer.adapter, is_sum=by_rows or by_columns or of_tokens)
        down = _from_here(down, 1, part.shape[-1], mesh) if by_columns else down
        up = _from_here(up, 0, product.shape[-1], mesh) if by_rows else up
        product = product + F.linear(F.linear(part, down), up)
    placement = Shard(input.dim() - 1) if by_rows else Partial() if by_columns else own
    shape = (*spread.shape[:-1], layer.matrix_shape[0])
    strides = tuple(accumulate((1, *reversed(shape[1:])), mul))[::-1]
    output: Tensor = DTensor.from_local(product, mesh, (placement,), shape=torch.Size(shape), stride=strides)
    return output if bias is None or inside else output + bias


def prepared(layer: MaskedLayer, input: Tensor) -> Any:
    """Return the input of a layer whose weight is a DTensor in the forward, spread as the weight wants it.

    Args:
        layer: Whose weight it is.
        input: A DTensor ``[..., K]``.

    Raises:
        RuntimeError: If the input is no DTensor on the weight's mesh, or that has more dimensions than one.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, last = layer.weight.device_mesh, input.dim() - 1  # type: ignore[attr-defined]
    who = f"layer {(layer.shard and layer.shard.name) or type(layer).__name__!r}"
    if mesh.ndim != 1:
        raise RuntimeError(f"{who} was called before its weight was gathered: call the module that FSDP2 manages.")
    spread: Any = input
    if not is_spread(spread) or spread.device_mesh != mesh:
        raise RuntimeError(
            f"{who} has a weight that is a DTensor but an input that is none on its mesh: parallelize it by a plan "
            "(parallelize_module), or make the input one (DTensor.from_local)."
        )
    own, wanted = spread.placements[0], Shard(last) if _is_cut(layer, by_rows=False) else Replicate()
    if own == wanted or (own.is_shard() and own.dim < last and layer.weight.placements[0].is_replicate()):  # type: ignore[attr-defined]
        return spread
    return spread.redistribute(mesh, (wanted,))


def _adapter_here(adapter: tuple[Tensor, Tensor], is_sum: bool) -> tuple[Tensor, Tensor]:
    """Return an adapter, which every process has, as it multiplies here; its gradients may be a sum over processes."""
    from torch.distributed.tensor import Partial, Replicate

    down, up = cast(tuple[Any, Any], adapter)
    placements = [*[Replicate()] * (down.device_mesh.ndim - 1), Partial() if is_sum else Replicate()]
    return down.to_local(grad_placements=placements), up.to_local(grad_placements=placements)


def _from_here(whole: Tensor, dimension: int, length: int, mesh: Any) -> Tensor:
    """Return the part of a tensor that belongs to the part of a weight that lies here, a view."""
    return whole.narrow(dimension, mesh.get_local_rank() * -(-whole.shape[dimension] // mesh.size()), length)


def _is_cut(layer: MaskedLayer, by_rows: bool) -> bool:
    """Say whether a layer's matrix ``[O, K]`` is cut by rows, or by columns, where it multiplies."""
    return bool(layer.weight.placements[0].is_shard(int(by_rows == layer.transposed)))  # type: ignore[attr-defined]
