"""Masks must be equal on every data-parallel rank."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

Groups = tuple[dist.ProcessGroup | None, ...]
"""Over all of which, one after the other, is reduced."""


@torch.no_grad()
def require_equal_codes(codes: Mapping[str, Tensor], groups: Mapping[str, Groups]) -> None:
    """Compare a hash of every layer's tile codes over the processes that hold the same weights.

    Does nothing where no process holds the same.

    Args:
        codes: Layer name to int16 codes of what lies here; the same layers in the same order on every rank.
        groups: Layer name to groups of processes that hold the same part of its weight.

    Raises:
        RuntimeError: If a layer's codes differ between ranks; raised on every rank that holds them, naming the layers.
    """
    together: dict[Groups, list[str]] = {}
    for name in codes:
        if groups[name]:
            together.setdefault(tuple(groups[name]), []).append(name)
    different = []
    for held, names in together.items():
        hashes = torch.stack([_hash(codes[name]) for name in names])
        bounds = torch.stack([hashes, -hashes])  # -hash as well, so that one reduction finds both ends
        for group in held:
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
        differs = (bounds[0] != -bounds[1]).tolist()
        different += [name for name, unequal in zip(names, differs, strict=True) if unequal]
    if different:
        raise RuntimeError(
            f"masks of {', '.join(different)} differ between data-parallel ranks: the ranks' weights must be equal, "
            "so check that gradients are averaged and that every rank starts from the same weights."
        )


def _hash(codes: Tensor) -> Tensor:
    flat = codes.reshape(-1).to(torch.int64)
    position = torch.arange(1, flat.numel() + 1, device=flat.device)
    wrapped = (flat * (position * 0x9E3779B1 | 1)).sum()  # around, which is what a hash may do
    return wrapped >> 1  # so that it can be negated
