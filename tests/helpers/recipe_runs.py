"""Starts of the recipe for many GPUs, on ranks that stand by (``ranks.py``)."""

from collections.abc import Sequence

import torch.distributed as dist

from sparsetrain.recipes.llama_fsdp2.options import read_options
from sparsetrain.recipes.llama_fsdp2.sharding import make_mesh
from sparsetrain.recipes.llama_fsdp2.starting import set_up


def refusals(cases: Sequence[Sequence[str]]) -> list[str]:
    """Return what runs are refused with on this rank, which is a number in words like ``--width={rank}``; "" if not."""
    messages = []
    for words in cases:
        options = read_options([word.format(rank=dist.get_rank()) for word in words])
        try:
            set_up(options, make_mesh(options))
            messages.append("")
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return messages
