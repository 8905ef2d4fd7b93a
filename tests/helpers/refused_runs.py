"""Runs on ranks that are refused: what each rank raises, and whether it left everything as it was."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import failure
from sharded_runs import batch, blocks, by_columns, mesh_of, shard
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.optim import AdamW, Optimizer

import sparsetrain as st
from sparsetrain.distributed.shards import local

SECONDS = 10.0
"""That a refusal may take, on a machine with other work."""


def picture(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Return what a refused run must not change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    extensions = ("fsdp_pre_all_gather", "fsdp_post_all_gather")
    return {
        "weights": [local(entry).detach().clone() for entry in model.parameters()],
        "classes": [type(module).__name__ for module in model.modules()],
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "extensions": [hasattr(local(entry), name) for entry in model.parameters() for name in extensions],
        "steps": optimizer and [len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)],
        "groups": optimizer and [len(group["params"]) for group in optimizer.param_groups],
    }


def refused(model: nn.Module, make: Callable[[nn.Module, Optimizer], Any], optimizer: Optimizer | None = None) -> str:
    """Return the message of a run that cannot be made, on this rank; the model must be as before, and train."""
    optimizer = AdamW(model.parameters(), lr=1e-2) if optimizer is None else optimizer
    before, start = picture(model, optimizer), time.perf_counter()
    message = failure(make, model, optimizer)
    assert message, "it was not refused"
    assert time.perf_counter() - start < SECONDS
    after = picture(model, optimizer)
    for name, value in before.items():
        equal = all(map(torch.equal, value, after[name])) if name == "weights" else value == after[name]
        assert equal, f"{name} are not what they were"
    model(batch(0)).square().mean().backward()
    optimizer.step()
    dist.barrier()
    return message


def run(model: nn.Module, optimizer: Optimizer, **options: Any) -> st.SparseTraining:
    """Make a run; with other values on some ranks, if options are functions of the rank."""
    rank = dist.get_rank()
    chosen = {name: value(rank) if callable(value) else value for name, value in options.items()}
    return st.SparseTraining(model, optimizer, **{"method": "fst", "total_steps": 12, "verbose": False, **chosen})


def two(hidden: int, **options: Any) -> nn.Module:
    """Return two linear layers in a sharded block."""
    model = nn.Sequential(nn.Sequential(nn.Linear(16, hidden), nn.Linear(hidden, 16)))
    shape = options.pop("shape", (dist.get_world_size(),))
    return shard(model, shape, **options)


def two_dimensional(hidden: int) -> nn.Module:
    """Return a block under tensor parallelism and FSDP2."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = mesh_of((2, 2), ("dp", "tp"))
    model = nn.Sequential(nn.Linear(16, hidden), nn.Linear(hidden, 16))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def own_root() -> nn.Module:
    """Return blocks of which FSDP2 was applied to a layer itself."""
    model: Any = blocks()
    fully_shard(model[0].up, mesh=mesh_of((dist.get_world_size(),), ("shard",)))
    return shard(model, (dist.get_world_size(),))


def partly() -> Any:
    """Return blocks of which the second is plain."""
    model: Any = blocks()
    fully_shard(model[0], mesh=mesh_of((dist.get_world_size(),), ("shard",)))
    return model


def on_two_meshes() -> Any:
    """Return blocks on two meshes."""
    model: Any = blocks()
    fully_shard(model[0], mesh=mesh_of((4,), ("shard",)))
    fully_shard(model[1], mesh=mesh_of((2, 2), ("replicate", "shard")))
    return model


def fsdp1() -> nn.Module:
    """Return blocks that FSDP1 has wrapped."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(blocks(), device_id=torch.device("cpu"), use_orig_params=True)


def sharded(**options: Any) -> nn.Module:
    """Return blocks that are sharded over all ranks."""
    return shard(blocks(), (dist.get_world_size(),), **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rows": lambda: two(20),
    "rows under HSDP": lambda: two(20, shape=(2, 2)),
    "columns": lambda: two(20, shard_placement_fn=by_columns),
    "both": lambda: two_dimensional(24),
    "own root": own_root,
    "some plain": partly,
    "two meshes": on_two_meshes,
    "offload": lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "part of the mesh": lambda: sharded(reshard_after_forward=2),
    "fsdp1": fsdp1,
    "sharded": sharded,
    "by columns": lambda: sharded(shard_placement_fn=by_columns),
    "plain": blocks,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "distillation": {"method": {"preset": "dense_to_sparse_finetune", "distillation": 0.5}},
    "wanda": {"method": {"preset": "asp_one_shot", "criterion": "wanda"}},
    "length": {"total_steps": lambda rank: 12 + rank},
    "method": {"method": lambda rank: {"preset": "fst", "refresh_every": 4 + rank}},
    "layers": {"exclude": lambda rank: ["1.gate"] if rank else []},
    "bad argument": {"backend": lambda rank: "nothing" if rank == 1 else "auto"},
    "no method": {"method": lambda rank: 7 if rank == 1 else "fst"},
    "one state": {"state": lambda rank: earlier() if rank else None},
    "damaged state": {"state": lambda rank: {**earlier(), **({"version": 99} if rank else {})}},
    "other state": {"state": lambda rank: earlier(steps=rank)},
}


def earlier(steps: int = 0) -> dict[str, Any]:
    """Return the state of a run in this process alone."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    model: Any = blocks()
    optimizer = AdamW(model.parameters())
    training = st.SparseTraining(model, optimizer, "fst", 12, verbose=False, group=alone)
    for _ in range(steps):
        optimizer.step()
    return training.state_dict()


def refusal(model: str, options: str = "") -> str:
    """Return what a run on a model of :data:`MODELS` is refused with."""
    return refused(MODELS[model](), lambda made, owner: run(made, owner, **OPTIONS.get(options, {})))


def sharded_afterwards(model: str) -> str:
    """Return what a model that is sharded during its run is refused with, then or in the next step."""
    ours: Any = nn.Sequential(nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 16))) if model == "rows" else blocks()
    optimizer = AdamW(ours.parameters(), lr=1e-2)
    run(ours, optimizer)
    count, start = dist.get_world_size(), time.perf_counter()

    def go_on() -> None:
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if model == "offload" else {}
        if model == "own root":
            fully_shard(ours[0].up, mesh=mesh_of((count,), ("shard",)))
        if model == "some plain":
            fully_shard(ours[0], mesh=mesh_of((count,), ("shard",)))
        else:
            shard(ours, (count,), **options)
        optimizer.param_groups[0]["params"][:] = ours.parameters()
        ours(batch(0)).square().mean().backward()
        optimizer.step()

    message = failure(go_on)
    assert time.perf_counter() - start < SECONDS
    dist.barrier()
    return message


def converted_too_early() -> str:
    """Return what the conversion of a model that was sharded in uneven parts since the last step is refused with."""
    model: Any = blocks(2, 16, 36)
    run(model, AdamW(model.parameters()))
    shard(model, (dist.get_world_size(),))
    return failure(model.double)


def verified() -> str:
    """Return what verify() says of a sharded model."""
    model = sharded()
    training = run(model, AdamW(model.parameters()), method="sr_ste")
    return failure(training.verify, batch(0))


def loaded(damaged: bool) -> tuple[str, int]:
    """Return what load_state_dict() of states that differ says, and the clock after it."""
    model = sharded()
    optimizer = AdamW(model.parameters())
    training, rank = run(model, optimizer), dist.get_rank()
    state = training.state_dict()
    if rank:
        state = {**state, **({"codes": {}} if damaged else {"last_refresh": -1})}
    return failure(training.load_state_dict, state), training.clock


def part_of_a_root() -> str:
    """Return what a run of the first block is refused with, if only the whole model is a root."""
    model = blocks()
    fully_shard(model, mesh=mesh_of((dist.get_world_size(),), ("shard",)))
    inner: Any = model.get_submodule("0")
    message = failure(run, inner, AdamW(inner.parameters()))
    model(batch(0)).square().mean().backward()
    return message


def head_of_its_own() -> list[str]:
    """Return the layers that become sparse if FSDP2 was applied to the output head itself."""
    model: Any = nn.Sequential(*blocks().children(), nn.Linear(16, 10))
    fully_shard(model[3], mesh=mesh_of((dist.get_world_size(),), ("shard",)))
    shard(model, (dist.get_world_size(),))
    training = run(model, AdamW(model.parameters()))
    return sorted(training.masks.layers)
