"""Runs on shards or in one process that are saved by ``torch.distributed.checkpoint``, and go on from there."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from sharded_runs import batch, blocks, outcome, shard
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_into
from torch.distributed.checkpoint.state_dict_saver import save as save_all

import sparsetrain as st

STEPS = 12

Shape = tuple[int, ...]
"""Of a mesh; empty for one process with whole weights."""


def run(
    method: Any,
    shape: Shape = (),
    saves: Mapping[int, str] = {},
    source: str = "",
    kill_at: int | None = None,
    stop: int = STEPS,
    **options: Any,
) -> dict[str, Any]:
    """Train blocks, from a checkpoint if there is a source, and return what there is to compare.

    Args:
        method: A preset's name, or a method.
        shape: Of the mesh.
        saves: Step to the folder that is written before it.
        source: Folder to go on from.
        kill_at: Step before which the last rank dies.
        stop: After so many steps.
        options: Of the run.
    """
    model, optimizer, training = made(method, shape, **options)
    if source:
        load(model, optimizer, training, source)
    losses = []
    for step in range(training.clock, stop):
        if step in saves:
            save(model, optimizer, training, saves[step])
        if step == kill_at and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            os._exit(1)
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, **outcome(model, training)}


def made(method: Any, shape: Shape = (), **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, st.SparseTraining]:
    """Return a model of blocks, its optimizer and its run, at the start."""
    model = shard(blocks(), shape) if shape else blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, st.SparseTraining(model, optimizer, method, STEPS, verbose=False, **options)


def save(model: nn.Module, optimizer: torch.optim.Optimizer, training: st.SparseTraining, folder: str) -> None:
    """Save a run as users do."""
    weights, moments = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_all({"model": weights, "optim": moments, "training": training.sharded_state_dict()}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, training: st.SparseTraining, folder: str) -> None:
    """Load a run as users do."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optim": moments, "training": training.sharded_state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_into(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    training.load_state_dict(state["training"])
