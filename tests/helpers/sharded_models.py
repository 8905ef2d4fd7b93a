"""Models and moments of sharding beside the ordinary one: each trains a model here and returns what to compare."""

from collections.abc import Callable
from typing import Any

import sharded_runs
import torch
import torch.distributed as dist
from ranks import failure
from sharded_runs import blocks, by_columns, outcome, shard, take_step
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers.pytorch_utils import Conv1D

import sparsetrain as st

STEPS = 8

METHOD = st.methods.fst(warmup=2, refresh_every=3, dense_tail=2)


def go_on(training: st.SparseTraining, optimizer: torch.optim.Optimizer, **options: Any) -> dict[str, Any]:
    """Train to the end."""
    model = training.model
    losses = [loss for step in range(STEPS) for loss in take_step(model, optimizer, step, **options)]
    return {"losses": losses, **outcome(model, training)}


def begin(model: nn.Module, method: Any = METHOD, **options: Any) -> tuple[st.SparseTraining, torch.optim.Optimizer]:
    """Return a run and its optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return st.SparseTraining(model, optimizer, method, STEPS, verbose=False, **options), optimizer


def plain(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Blocks of linear layers."""
    return go_on(*begin(spread(blocks()), **options))


def convolutions(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Convolutions, one of them pointwise."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    model = spread(nn.Sequential(inner, nn.Conv2d(8, 8, 3)))
    return go_on(*begin(model, targets="all-conv", **options), shape=(2, 8, 6, 6))


def double_pruned_convolutions(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Convolutions whose input gradient sees a weight that is pruned further."""
    return convolutions(spread, method="slope", **options)


def transposed(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Layers whose weight is stored [I, O]."""
    torch.manual_seed(0)
    layers = [Conv1D(32, 16), nn.ReLU(), Conv1D(16, 32), nn.Identity()]  # type: ignore[no-untyped-call]
    return go_on(*begin(spread(nn.Sequential(nn.Sequential(*layers), nn.Linear(16, 16))), **options))


def compiled(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Blocks that are compiled whole."""
    torch.compiler.reset()
    training, optimizer = begin(spread(blocks()), **options)
    for child in training.model.children():
        child.compile(backend="aot_eager", fullgraph=True)
    return go_on(training, optimizer)


def converted(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """A model that is moved and cast after it was sharded, and back."""
    training, optimizer = begin(spread(blocks()), **options)
    training.model.double().to("cpu").float()
    return go_on(training, optimizer)


def assigned(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """A model into which other parameters are loaded."""
    training, optimizer = begin(spread(blocks()), **options)
    state = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.model.load_state_dict(state, assign=True)
    optimizer.param_groups[0]["params"] = list(training.model.parameters())
    return go_on(training, optimizer)


def sharded_late(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """A model that is sharded after its run was made."""
    training, optimizer = begin(blocks(), method="slope", track_age=True, **options)
    spread(training.model)
    optimizer.param_groups[0]["params"] = list(training.model.parameters())
    return go_on(training, optimizer)


def gathered_when_searched(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Masks are searched while an evaluation has left the root's weights gathered."""
    training, optimizer = begin(spread(blocks()), method="fst", **options)
    with torch.no_grad():
        training.model(sharded_runs.batch(0))
    training.refresh()
    return go_on(training, optimizer)


def evaluated_in_inference_mode(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Every step is followed by an evaluation without any trace of autograd, phase changes too."""
    training, optimizer = begin(spread(blocks()), **options)
    losses = []
    for step in range(STEPS):
        losses += take_step(training.model, optimizer, step)
        with torch.inference_mode():
            losses.append(training.model(sharded_runs.batch(0)).sum().item())
    return {"losses": losses, **outcome(training.model, training)}


def finished(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """A run that ends sparse, and the plain model that trains on after it."""
    training, optimizer = begin(spread(blocks()), method="asp_one_shot", **options)
    found = go_on(training, optimizer)
    training.finish()
    found["losses"] += [loss for step in (0, 1) for loss in take_step(training.model, optimizer, step)]
    found["weights"] = {name: sharded_runs.whole(value) for name, value in training.model.state_dict().items()}
    return found


def recomputed(spread: Callable[[nn.Module], nn.Module], **options: Any) -> dict[str, Any]:
    """Blocks whose activations are computed again in the backward."""
    model = blocks()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, sharded_runs.Block))
    return go_on(*begin(spread(model), **options))


MODELS = [
    plain, convolutions, double_pruned_convolutions, transposed, compiled, converted, assigned, sharded_late,
    gathered_when_searched, evaluated_in_inference_mode, finished, recomputed,
]  # fmt: skip


def on_shards(name: str, gather: str) -> dict[str, Any]:
    """Train one under FSDP2 on all ranks."""
    found: dict[str, Any] = globals()[name](lambda model: shard(model, (dist.get_world_size(),)), gather=gather)
    return found


def on_columns(gather: str) -> dict[str, Any]:
    """Train blocks whose weights are cut by input features."""
    shape = (dist.get_world_size(),)
    return plain(lambda model: shard(model, shape, shard_placement_fn=by_columns), gather=gather)


def on_one_rank(gather: str, method: Any = METHOD) -> dict[str, Any]:
    """Train blocks under FSDP2 on a mesh of this process alone."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mesh = DeviceMesh.from_group(groups[dist.get_rank()], "cpu")

    def spread(model: nn.Module) -> nn.Module:
        fully_shard(model, mesh=mesh)
        return model

    return plain(spread, gather=gather, method=method)


def without_hooks(gather: str) -> str:
    """Return what a step says after local tensors were replaced, unnoticed."""
    training, optimizer = begin(shard(blocks(), (dist.get_world_size(),)), method="asp_one_shot", gather=gather)
    for step in range(STEPS):
        take_step(training.model, optimizer, step)
    for layer in training.masks.layers.values():
        assert layer.shard is not None
        layer.shard.detach()
    return failure(take_step, training.model, optimizer, STEPS)


def what_a_reader_finds() -> tuple[bool, bool]:
    """Return whether a gathered weight reads as no numbers, packed, and as the masked weight, masked."""
    found = []
    for gather in ("packed", "masked"):
        training, _ = begin(shard(blocks(), (dist.get_world_size(),)), method="fst", gather=gather)
        module: Any = training.model[0]  # type: ignore[index]
        module.unshard()
        found.append(bool(module.up.weight.float().abs().sum().isnan()))
        module.reshard()
    return found[0], found[1]
