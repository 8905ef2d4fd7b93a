"""Sharded checkpoints: every rank writes what it holds, and a run goes on with any number of ranks."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from sparsetrain.checkpoint import require_same_weights
from sparsetrain.checkpoint.pruned_entries import PLAIN_KEY

from ..data.streamed import StreamedBlocks


def last_checkpoint(output: str) -> str | None:
    """Return the folder of the last whole checkpoint, as rank 0 sees it, or None."""
    # what a killed run left unfinished has no metadata
    found = sorted(path.parent for path in Path(output).glob("step-*/.metadata"))
    answer = [str(found[-1]) if found else None]
    dist.broadcast_object_list(answer)
    return answer[0]


def save_run(
    output: str, step: int, model: nn.Module, optimizer: Optimizer, data: StreamedBlocks, training: Any | None
) -> None:
    """Write ``output/step-…``: model, optimizer, sparse training, and each rank's position in its data."""
    weights, moments = get_state_dict(model, optimizer)
    state = {
        "model": weights,
        "optimizer": moments,
        "step": step,
        "world": dist.get_world_size(),
        f"data.{dist.get_rank()}": json.dumps(data.state_dict()),
    }
    if training is not None:
        state["training"] = training.sharded_state_dict()
    save(state, checkpoint_id=f"{output}/step-{step:08}")


def require_same_run(folder: str, model: nn.Module, sparse: bool) -> None:
    """Raise ``ValueError`` unless a checkpoint is of this model, and of a sparse run if this is one; loads nothing."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    if sparse != (f"training.{PLAIN_KEY}" in saved):
        was, now = ("dense", "sparse") if sparse else ("sparse", "dense")
        raise ValueError(f"method makes this run {now}, but {folder} is of a {was} one: name another output.")
    weights = {
        key.removeprefix("model."): torch.empty(entry.size, device="meta")
        for key, entry in saved.items()
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    try:
        require_same_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"{folder}: {str(error).rstrip('.')}, or name another output.") from error


def load_(state: dict[str, Any], folder: str) -> None:
    """Load what a state names from a checkpoint.

    Raises:
        ValueError: If that lacks some of it, or cannot be read.
    """
    try:
        load(state, checkpoint_id=folder)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(f"{folder} cannot be loaded: {str(reason).rstrip('.')}; name another output.") from error


def resume_(folder: str, model: nn.Module, optimizer: Optimizer, data: StreamedBlocks) -> int:
    """Load model, optimizer and data, and return the steps that were taken.

    With another number of ranks the data begin at their start, because each rank has other documents then. It comes
    before sparse training: torch fills an optimizer without state by a step, which would count.
    """
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "step": 0, "world": 0}
    load_(state, folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if state["world"] == dist.get_world_size():
        own = f"data.{dist.get_rank()}"
        position = {own: ""}
        load_(position, folder)
        data.load_state_dict(json.loads(position[own]))
    elif dist.get_rank() == 0:
        print(f"{folder} is of {state['world']} ranks: the data begin at their start.")
    return int(state["step"])
