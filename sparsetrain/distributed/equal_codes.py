"""Masks must be equal on every data-parallel rank."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .world import world_size


@torch.no_grad()
def require_equal_codes(codes: Mapping[str, Tensor]) -> None:
    """Compare a hash of every layer's tile codes over all ranks.

    Does nothing in a run with one process.

    Args:
        codes: Layer name to int16 codes; the same layers in the same order on every rank.

    Raises:
        RuntimeError: If a layer's codes differ between ranks; raised on every rank, naming the layers.
    """
    if world_size() == 1 or not codes:
        return
    hashes = torch.stack([_hash(layer) for layer in codes.values()])
    lowest, highest = hashes.clone(), hashes.clone()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    different = (lowest != highest).tolist()
    if any(different):
        names = ", ".join(name for name, differs in zip(codes, different, strict=True) if differs)
        raise RuntimeError(
            f"masks of {names} differ between data-parallel ranks: the ranks' weights must be equal, "
            "so check that gradients are averaged and that every rank starts from the same weights."
        )


def _hash(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1).to(torch.int64)
    position = torch.arange(1, flat.numel() + 1, device=flat.device)
    return (flat * (position * 0x9E3779B1 | 1)).sum()  # wraps around, which is what a hash may do
