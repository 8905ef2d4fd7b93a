"""Pipelines of two stages with replicas, by hand, and optimizers that are shared out over replicas."""

from typing import Any

import torch
import torch.distributed as dist
from ranks import failure
from sharded_runs import Block, batch, blocks, mesh_of, outcome, shard, take_step, train
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

import sparsetrain as st
from sparsetrain.optim import SparseAdamW

STEPS = 12

STAGES = 2

_GROUPS: list[dist.ProcessGroup] = []


def replicas(stage: int) -> dist.ProcessGroup:
    """Return the ranks that hold a stage: 0 and 1, 2 and 3."""
    if not _GROUPS:
        count = dist.get_world_size() // STAGES
        _GROUPS.extend(dist.new_group([count * stage + i for i in range(count)]) for stage in range(STAGES))
    return _GROUPS[stage]


def stages() -> list[nn.Module]:
    """Return two stages with other layers each, the same in every process."""
    torch.manual_seed(0)
    return [nn.Sequential(Block(), Block()), nn.Sequential(Block(16, 48), nn.Linear(16, 16))]


def one_process(method: Any) -> list[dict[str, Any]]:
    """Train both stages, an engine each, and return losses and what became of each."""
    models = stages()
    owners = [AdamW(model.parameters(), lr=1e-2) for model in models]
    runs = [st.SparseTraining(*pair, method, STEPS, verbose=False) for pair in zip(models, owners, strict=True)]
    losses = []
    for step in range(STEPS):
        loss = models[1](models[0](batch(step))).square().mean()
        loss.backward()
        for owner in owners:
            owner.step()
            owner.zero_grad()
        losses.append(loss.item())
    return [{"losses": losses, **outcome(*pair)} for pair in zip(models, runs, strict=True)]


def pipeline(method: Any, planted: bool = False, sharded: bool = False) -> dict[str, Any]:
    """Train this rank's stage, its replicas or shards on equal batches, and return losses and what became of it."""
    count = dist.get_world_size() // STAGES
    stage, replica = divmod(dist.get_rank(), count)
    groups = [replicas(number) for number in range(STAGES)]
    model, other = stages()[stage], (dist.get_rank() + count) % dist.get_world_size()
    if sharded:
        fully_shard(model, mesh=mesh_of((STAGES, count), ("stage", "shard"))["shard"])
    owner = AdamW(model.parameters(), lr=1e-2)
    group = None if sharded else groups[stage]
    training = st.SparseTraining(model, owner, method, STEPS, verbose=False, group=group)
    losses = []
    for step in range(STEPS):
        losses.append(_first(model, batch(step), other) if stage == 0 else _last(model, other))
        for parameter in [] if sharded else model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=groups[stage])
            parameter.grad.div_(count)
        owner.step()
        owner.zero_grad()
    if planted:
        if (stage, replica) == (1, 0):
            with torch.no_grad():
                model.get_parameter("0.up.weight").copy_(torch.randn(48, 16))
        return {"error": failure(training.refresh)}
    return {"losses": losses, **outcome(model, training)}


def _first(model: nn.Module, input: Tensor, other: int) -> float:
    output = model(input)
    dist.send(output.detach(), other)
    gradient = torch.empty_like(output)
    dist.recv(gradient, other)
    output.backward(gradient)
    return 0.0


def _last(model: nn.Module, other: int) -> float:
    input = torch.empty(8, 16)
    dist.recv(input, other)
    loss = model(input.requires_grad_()).square().mean()
    loss.backward()
    assert input.grad is not None
    dist.send(input.grad, other)
    return float(loss)


def scheduled(method: Any) -> dict[str, Any]:
    """Train this rank's stage under torch's own schedule of micro-batches."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, count = dist.get_rank(), dist.get_world_size()
    model = stages()[rank]
    stage = PipelineStage(model, rank, count, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda output, target: output.square().mean())
    owner = AdamW(model.parameters(), lr=1e-2)
    alone = dist.new_group([rank], use_local_synchronization=True)
    training = st.SparseTraining(model, owner, method, STEPS, verbose=False, group=alone)
    for step in range(STEPS):
        schedule.step(batch(step)) if rank == 0 else schedule.step(target=torch.zeros(8, 16))
        owner.step()
        owner.zero_grad()
    return outcome(model, training)


def data_parallel(
    method: Any, zero: bool, kind: str = "AdamW", stop: int = STEPS, state: Any = None, **options: Any
) -> dict[str, Any]:
    """Train under DDP, with torch's ZeRO or without, on other batches on each rank; stop early or go on from there."""
    model, rank = DistributedDataParallel(blocks()), dist.get_rank()
    kinds: dict[str, Any] = {"AdamW": AdamW, "SGD": SGD, "fused": SparseAdamW}
    values: dict[str, Any] = {"momentum": 0.9} if kind == "SGD" else {}
    owner: torch.optim.Optimizer = (
        ZeroRedundancyOptimizer(model.parameters(), kinds[kind], lr=1e-2, **values)
        if zero
        else kinds[kind](model.parameters(), lr=1e-2, **values)
    )
    if state is not None:
        model.load_state_dict(state["model"])
        owner.load_state_dict(state["optimizer"])
        options = {**options, "state": state["training"]}
    training = st.SparseTraining(model, owner, method, STEPS, verbose=False, **options)
    losses = []
    for step in range(training.clock, stop):
        owner.zero_grad()
        loss = model(batch(2 * step + rank)).square().mean()
        loss.backward()
        owner.step()
        losses.append(loss.item())
    if stop < STEPS:
        if isinstance(owner, ZeroRedundancyOptimizer):
            owner.consolidate_state_dict(0)
        states = [owner.state_dict() if rank == 0 else None]  # ZeRO has it there alone
        dist.broadcast_object_list(states)
        saved = {"model": model.state_dict(), "optimizer": states[0], "training": training.state_dict()}
        rest = data_parallel(method, zero, kind, state=saved, **options)
        return {**rest, "losses": [*losses, *rest["losses"]]}
    return {"losses": losses, **outcome(model.module, training)}


def zero_refused(method: Any, overlap: bool = False) -> str:
    """Return what a run with torch's ZeRO is refused with."""
    model = DistributedDataParallel(blocks())
    owner = ZeroRedundancyOptimizer(
        model.parameters(), AdamW, lr=1e-2, overlap_with_ddp=overlap, parameters_as_bucket_view=False
    )
    return failure(st.SparseTraining, model, owner, method, STEPS, verbose=False)


def planted_on_replicas() -> str:
    """Return what a refresh says after one replica of a sharded model was written to."""
    model = shard(blocks(), (2, 2))
    owner = AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, owner, "fst", STEPS, verbose=False)
    if dist.get_rank() == 2:  # the first shard of the second replica
        with torch.no_grad():
            training.masks.layers["1.down"].master.copy_(torch.randn(8, 32))
    return failure(training.refresh)


def uneven(hidden: int, method: Any, **options: Any) -> dict[str, Any]:
    """Train blocks over all ranks, of which some hold no rows of some layers."""
    return train(shard(blocks(2, 16, hidden), (dist.get_world_size(),)), method, **options)


def uneven_and_converted(hidden: int, method: Any, **options: Any) -> dict[str, Any]:
    """Do that with a model that is cast to another dtype and back before the first step, and before the third."""
    model = shard(blocks(2, 16, hidden), (dist.get_world_size(),))
    owner = AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, owner, method, STEPS, verbose=False, **options)
    losses = []
    for step in range(STEPS):
        if step in (0, 2):
            model.double().float()
        losses += take_step(model, owner, step)
    return {"losses": losses, **outcome(model, training)}
