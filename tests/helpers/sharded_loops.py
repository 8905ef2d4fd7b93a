"""What loops on shards do beside training: they ask a teacher, and send messages (``test_sharded_loops.py``)."""

from typing import Any

import torch
import torch.distributed as dist
from parallel_runs import train_part
from sharded_runs import STEPS, blocks, shard, take_step
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import sparsetrain as st


def distilled(method: Any, gather: str, shards_teacher: bool) -> dict[str, Any]:
    """Train sharded blocks with a teacher that is whole, or sharded as well."""
    teacher = trained_teacher()
    if shards_teacher:
        shard(teacher, (dist.get_world_size(),))
    return train_part(shard(blocks(), (dist.get_world_size(),)), method, teacher=teacher, gather=gather)


def trained_teacher() -> nn.Module:
    """Return a teacher that says something else than the student."""
    teacher = blocks()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    return teacher


def messages(method: Any, gather: Any) -> dict[str, dict[str, int]]:
    """Return how often each operator of communication is called in a step, dense and sparse, and by ``metrics()``."""
    found: dict[str, dict[str, int]] = {}
    for name, chosen in {"dense": None, "sparse": method}.items():
        model = shard(blocks(), (dist.get_world_size(),))
        owner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        training = chosen and st.SparseTraining(model, owner, chosen, STEPS, gather=gather, verbose=False)
        take_step(model, owner, 0)  # makes what FSDP2 makes once
        with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
            take_step(model, owner, 1)
        found[name] = {str(operator): count for operator, count in counted.get_comm_counts().items()}
        if training:
            with CommDebugMode() as counted:  # type: ignore[no-untyped-call]
                training.metrics()
            found["metrics"] = {str(operator): count for operator, count in counted.get_comm_counts().items()}
    return found
