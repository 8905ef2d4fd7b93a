"""Runs on shards or in one process that are saved by ``torch.distributed.checkpoint``, and go on from there."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from ranks import failure
from sharded_runs import batch, blocks, mesh_of, outcome, shard, take_step
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_into
from torch.distributed.checkpoint.state_dict_saver import save as save_all
from torch.distributed.tensor import Shard, distribute_tensor

import sparsetrain as st
from sparsetrain.checkpoint import detach_pruned, restore_pruned_
from sparsetrain.distributed.layouts import Layout
from sparsetrain.distributed.shards import gathered as gather

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
        losses += take_step(model, optimizer, step)
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


def trained(method: Any, shape: Shape = (), steps: int = 5, **options: Any) -> tuple[nn.Module, Any, st.SparseTraining]:
    """Return a model, its optimizer and its run after some steps."""
    model, optimizer, training = made(method, shape, **options)
    for step in range(steps):
        take_step(model, optimizer, step)
    return model, optimizer, training


def states(method: Any, shape: Shape, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the state of a run on shards with gathered tensors, and the placements of its DTensors."""
    state = trained(method, shape, **options)[2].state_dict()
    placements = {}

    def gathered(value: Any, path: str = "") -> Any:
        if isinstance(value, Mapping):
            return {key: gathered(entry, f"{path}.{key}") for key, entry in value.items()}
        if isinstance(value, list):
            return [gathered(entry, f"{path}.{index}") for index, entry in enumerate(value)]
        if hasattr(value, "device_mesh"):
            placements[path] = repr(value.placements)
            return gather(value)
        return value

    return gathered(state), placements


def loaded(method: Any, shape: Shape, state: Any, form: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a whole state into a new run on shards as tensors of some form, and return its state then, gathered."""
    _, _, training = made(method, shape, **options)
    own = training.masks.layers["0.up"].shard
    assert own is not None
    mesh: Any = own.weight.device_mesh  # type: ignore[attr-defined]

    def formed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: formed(entry) for key, entry in value.items()}
        if not isinstance(value, torch.Tensor) or form == "whole" or value.dim() < 2:
            return value
        return distribute_tensor(value, mesh, [Shard(1)] * mesh.ndim, src_data_rank=None)

    training.load_state_dict(formed(state))
    again = training.state_dict()
    return {name: gather(codes) for name, codes in again["codes"].items()}, again["flips"]


def refusals(method: Any, shape: Shape, damage: str) -> str:
    """Return what a rank says to a state of which rank 1 has a damaged part."""
    _, _, training = trained(method, shape)
    state, before = training.state_dict(), training.masks.codes["0.up"].clone()
    if torch.distributed.get_rank() == 1:
        if damage == "codes":
            state["codes"]["0.up"].to_local().fill_(0x0101)
        elif damage == "clock":
            del state["clock"]
        elif damage == "no tensor":
            state["codes"]["0.up"] = None
    said = failure(training.load_state_dict, state)
    assert torch.equal(before, training.masks.codes["0.up"])
    return said


def exported(method: Any, shape: Shape) -> dict[str, Any]:
    """Return what every way out of a sparse run on shards gives, and what the model computes before and after."""
    model, _, training = trained(method, shape)
    masters = {name: gather(value) for name, value in model.state_dict().items()}
    pruned_in = model.state_dict()
    pruned = detach_pruned(pruned_in, training.masks.layers)
    found: dict[str, Any] = {
        "evaluated": {name: gather(value) for name, value in st.sparse_state_dict(model).items()},
        "changed": {name: gather(value) for name, value in st.sparse_state_dict(model, model.state_dict()).items()},
        "detached": {name: gather(value) for name, value in pruned_in.items()},
        "refused": failure(st.sparse_state_dict, model, {name: value.clone() for name, value in masters.items()}),
        "before": model(batch(0)).detach(),
    }
    codes = {name: training.masks.state_dict()["codes"][name] for name in training.masks.layers}
    with torch.no_grad():
        for layer in training.masks.layers.values():
            layer.weight.zero_()
    restore_pruned_(training.masks.layers, codes, pruned)
    found["restored"] = all(torch.equal(gather(value), masters[name]) for name, value in model.state_dict().items())
    training.finish()
    output = model(batch(0))
    output.square().mean().backward()
    found |= {"after": output.detach(), "zeros": {name: gather(value) for name, value in model.state_dict().items()}}
    training.apply_masks_()
    found["again"] = model(batch(0)).detach()
    return found


def round_trip(folder: str, length: int) -> list[bool]:
    """Return whether uneven parts come back: cut from the whole, gathered, and through a checkpoint."""
    mesh, found = mesh_of((torch.distributed.get_world_size(),), ("shard",)), []
    for dtype in (torch.bool, torch.int16, torch.uint8, torch.float32):
        whole = (torch.arange(3 * length).view(length, 3) % 5).to(dtype)
        layout = Layout((length, 3), dtype, mesh, (Shard(0),))
        spread = layout.spread(layout.part(whole))
        found.append(torch.equal(gather(spread), whole))
        state = {"entry": layout.zeros()}
        save_all({"entry": spread}, checkpoint_id=f"{folder}/{dtype}")
        load_into(state, checkpoint_id=f"{folder}/{dtype}")
        found.append(torch.equal(gather(state["entry"]), whole))
    return found
