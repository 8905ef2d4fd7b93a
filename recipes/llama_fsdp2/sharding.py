"""The model: built without memory, sharded, then filled."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ..gpt.model import GPT, initial_std
from .options import Options

VOCABULARY = 256  # bytes


def make_mesh(options: Options) -> DeviceMesh:
    """Return all ranks as a row of shards, or as ``replicas`` rows.

    Raises:
        ValueError: If the ranks are no multiple of the replicas.
    """
    world, replicas = dist.get_world_size(), options.replicas
    if world % replicas:
        raise ValueError(f"replicas is {replicas}: it must divide the {world} ranks.")
    if replicas == 1:
        return init_device_mesh(options.device, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(options.device, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def sharded_model(options: Options, mesh: DeviceMesh) -> GPT:
    """Return the model in float32, each rank with its rows of every weight."""
    with torch.device("meta"):
        model = GPT(
            VOCABULARY, options.width, options.depth, options.heads, options.context, hidden=options.hidden, tied=False
        )
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, options.precision), reduce_dtype=torch.float32)
    for block in model.blocks:
        # instead of the forward itself, so that the names of parameters stay
        forward = block.forward
        if options.activation_checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = torch.compile(forward) if options.compile else forward
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=options.reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=options.reshard)
    model.to_empty(device=options.device)
    fill_(model, options)
    return model


@torch.no_grad()
def fill_(model: nn.Module, options: Options) -> None:
    """Draw every matrix whole on every rank, which keeps its rows: the start is the same on any number of ranks."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)  # of norms
            continue
        assert isinstance(parameter, DTensor)
        whole = torch.empty(parameter.shape, device=options.device)
        whole.normal_(std=initial_std(name, options.depth), generator=generator)
        parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))


def whole(value: Tensor) -> Tensor:
    """Return a tensor itself, or all of a sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value
