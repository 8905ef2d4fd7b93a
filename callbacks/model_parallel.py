"""What checkpoints of Lightning's ``ModelParallelStrategy`` hold of sparse training, in shards or in one file.

A checkpoint in shards is a folder. ``torch.distributed.checkpoint`` saves its ``state_dict`` and optimizers there, each
process its own parts; rank 0 alone saves everything else, in ``meta.pt``. So tensors of sparse training, and the
masters of pruned weights, are saved with the first optimizer, as ``optimizer_0.sparsetrain``, and the rest in
``meta.pt``.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from sparsetrain.checkpoint import CHECKPOINT_KEY, PRUNED_KEY, weight_key
from sparsetrain.checkpoint.pruned_entries import PLAIN_KEY, evaluated, plain_key
from sparsetrain.checks.rules import TEXT, sequence
from sparsetrain.checks.states import refuse, require_state
from sparsetrain.distributed.shards import gathered, is_spread
from sparsetrain.layers.masked_layer import MaskedLayer
from sparsetrain.training import SparseTraining
from sparsetrain.training.sharded_state import PLAIN, in_nested_form
from sparsetrain.training.state_layouts import replaced, tensors_in

SHARDS_KEY = "shards"
"""Where ``checkpoint["sparsetrain"]`` says that it is one in shards, and where its tensors are."""

SHARDS = f"optimizer_0.{CHECKPOINT_KEY}"

OPTIMIZERS = "optimizer_states"
"""Where a Lightning checkpoint holds those."""

Parts = tuple[dict[str, Any], dict[str, Any]]
"""What is saved under ``checkpoint["sparsetrain"]``, and what in shards."""


def is_model_parallel(trainer: Trainer) -> bool:
    """Say whether a trainer's strategy leaves sharding to the module."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def state_in_parts(training: SparseTraining, module: nn.Module, weights: MutableMapping[str, Any]) -> Parts:
    """Return what a checkpoint holds of a run beside the weights; every process has to call this.

    Args:
        training: The run.
        module: That it trains.
        weights: The strategy's state dict of the module, whose masters are replaced by what products see.
    """
    in_shards = any(map(is_spread, weights.values()))  # otherwise rank 0 has them all, and the others have none
    keys = _keys(training, module, weights)
    return _in_shards(training, weights, keys) if in_shards else (_whole(training, weights, keys), {})


def put_shards_(checkpoint: MutableMapping[str, Any], shards: Mapping[str, Any]) -> None:
    """Put tensors where the strategy saves them in shards."""
    if shards and checkpoint.get(OPTIMIZERS):
        first, *others = checkpoint[OPTIMIZERS]
        checkpoint[OPTIMIZERS] = [{**first, CHECKPOINT_KEY: shards}, *others]


def is_in_shards(state: Any) -> bool:
    """Say whether the tensors of a checkpoint's state are elsewhere."""
    return isinstance(state, Mapping) and SHARDS_KEY in state


def plain_part(state: Any) -> Any:
    """Return a checkpoint's state without its tensors if those are elsewhere; the state itself otherwise.

    Raises:
        ValueError: If it is damaged.
    """
    if not is_in_shards(state):
        return state
    for key, rule in ((PLAIN_KEY, PLAIN), (PRUNED_KEY, sequence(TEXT))):
        require_state(key, state.get(key), rule)
    others = {key: value for key, value in state.items() if key not in (PLAIN_KEY, SHARDS_KEY)}
    return {**state[PLAIN_KEY][0]["state"], **others}


def state_to_load(trainer: Trainer, state: Any) -> Any:
    """Return a checkpoint's state as a run takes it that is about to go on from there: whole, or what reads shards."""
    return (lambda training: state_from_shards(trainer, training, state)) if is_in_shards(state) else state


def state_from_shards(trainer: Trainer, training: SparseTraining, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state whose tensors are in shards, as they lie here; every process has to call this.

    Args:
        trainer: It restores a checkpoint.
        training: A run that is about to go on from there.
        state: What the checkpoint holds under ``"sparsetrain"``.

    Raises:
        ValueError: If it is damaged or of another model.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    plain = plain_part(state)
    layers, known = training.masks.layers, training.sharded_state_dict()
    for name in state[PRUNED_KEY]:
        if name not in layers:
            refuse(f"checkpoint holds pruned values of {name!r}, which is no sparse layer here")
    there = [".".join(map(str, path)) for path in state[PLAIN_KEY][0]["tensors"]]
    tensors = {key: known[key] for key in there if key in known}
    masters = {name: torch.empty_like(layers[name].parameter) for name in state[PRUNED_KEY]}
    wanted = {**tensors, **{f"{PRUNED_KEY}.{name}": master for name, master in masters.items()}}
    if wanted:
        path = trainer.strategy.broadcast(trainer.ckpt_path)
        load({SHARDS: wanted}, checkpoint_id=path)
    found: dict[str, Any] = in_nested_form({PLAIN_KEY: state[PLAIN_KEY], **tensors})
    return {**plain, **found, PRUNED_KEY: masters}


@torch.no_grad()
def _in_shards(training: SparseTraining, weights: MutableMapping[str, Any], keys: Mapping[str, list[str]]) -> Parts:
    shards, merges = training.sharded_state_dict(), training.method.adapter_merge
    plain = shards[PLAIN_KEY]  # stays there too, so that the folder can be consolidated
    pruned = _masked(training)
    for name, layer in pruned.items():
        shards[f"{PRUNED_KEY}.{name}"] = master = weights[keys[name][0]]
        weights.update(dict.fromkeys(keys[name], evaluated(layer, master, merges).to(master.device)))
    return {SHARDS_KEY: SHARDS, PLAIN_KEY: plain, PRUNED_KEY: [*pruned]}, shards


@torch.no_grad()
def _whole(
    training: SparseTraining, weights: MutableMapping[str, Any], keys: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Return the state with whole tensors; pruned entries are with it where the state dict has weights, on rank 0."""
    state, merges = training.state_dict(), training.method.adapter_merge
    whole = {path: gathered(tensor).cpu() for path, tensor in tensors_in(state) if is_spread(tensor)}
    pruned = {}
    for name, layer in _masked(training).items():
        kept, seen = gathered(layer.mask), gathered(evaluated(layer, layer.parameter, merges))
        if keys[name]:
            master = weights[keys[name][0]]
            changed = layer.soft_scale is not None or (merges and layer.adapter is not None)
            pruned[name] = (master.flatten() if changed else master[~kept.to(master.device)]).cpu()
            weights.update(dict.fromkeys(keys[name], seen.to(master.device)))
    return {**replaced(state, whole), PRUNED_KEY: pruned}


def _keys(training: SparseTraining, module: nn.Module, weights: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of a layer's weight in a state dict, by the layer's; a module that is shared has several."""
    names = {layer: name for name, layer in training.masks.layers.items()}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, MaskedLayer) and part in names:
            key = weight_key(path)
            found[names[part]] += [known for known in (key, plain_key(key)) if known in weights][:1]
    return found


def _masked(training: SparseTraining) -> dict[str, MaskedLayer]:
    return {name: layer for name, layer in training.masks.layers.items() if layer.is_masked}
