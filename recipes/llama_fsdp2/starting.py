"""A run before its first step; what cannot run is said here, by every rank, before anything trains."""

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sparsetrain.distributed.agreement import together
from sparsetrain.hardware.extras import require
from sparsetrain.methods import resolve_method
from sparsetrain.training import SparseTraining

from ..data.streamed import StreamedBlocks
from ..optimization import weight_decay_groups
from .checkpoints import last_checkpoint, load_, require_same_run, resume_
from .options import Options
from .sharding import sharded_model


class Run(NamedTuple):
    """What trains, and the steps that it has taken."""

    model: nn.Module
    optimizer: Optimizer
    data: StreamedBlocks
    training: SparseTraining | None
    first: int


def set_up(options: Options, mesh: DeviceMesh) -> Run:
    """Return a run at its start, or where the last checkpoint in the output folder is.

    Raises:
        ValueError: If something cannot train, be read or written, or the checkpoint is of another run.
        RuntimeError: If another rank cannot set it up.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    stream = partial(StreamedBlocks, options.source, options.split, options.text_column, options.context)
    stream = partial(stream, options.batch_size, rank, world)
    with together((dist.group.WORLD,), "the run") as note:
        note(lambda: asdict(options))
        method = None if options.method is None else resolve_method(options.method)
        if options.wandb:
            require("wandb", "wandb", "--wandb")
        make_folder(options.output)
        next(iter(stream()))  # of a stream of its own: positions are those after batches that were trained on
    model = sharded_model(options, mesh)
    groups = weight_decay_groups(model.parameters(), options.weight_decay)
    fused = not (method and method.freeze_second_moments)  # a fused step writes second moments itself
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=fused)
    data, folder, first = stream(), last_checkpoint(options.output), 0
    if folder:
        require_same_run(folder, model, options.method is not None)
        first = resume_(folder, model, optimizer, data)
        if first > options.steps:
            raise ValueError(
                f"steps is {options.steps}, but {folder} has taken {first}: raise it, or name another output."
            )
    return Run(model, optimizer, data, sparse_training(model, optimizer, options, folder), first)


def make_folder(output: str) -> None:
    """Make a folder for checkpoints, unless it is there.

    Raises:
        ValueError: If it cannot be made or written to.
    """
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output is {output!r}, which cannot be made: {error.strerror}; name another folder."
        ) from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise ValueError(f"output is {output!r}, which cannot be written to: name another folder.")


def sparse_training(
    model: nn.Module, optimizer: Optimizer, options: Options, folder: str | None
) -> SparseTraining | None:
    """Make a sharded model sparse while it trains, and go on from a checkpoint; None for a dense run."""
    if options.method is None:
        return None
    verbose = dist.get_rank() == 0
    training = SparseTraining(
        model, optimizer, options.method, options.steps, options.targets, gather=options.gather, verbose=verbose
    )
    if folder:
        state = {"training": training.sharded_state_dict()}
        load_(state, folder)
        training.load_state_dict(state["training"])
    return training
