"""Models whose layers a criterion observes, and what it sees of them, computed from the equations."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from models import mlp
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.criteria import Criterion, Wanda
from sparsetrain.distributed.peers import Peers
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.masked_layer import MaskedLayer
from sparsetrain.modifiers.criterion_observer import Observer


def observed(criterion: Criterion, **options: Any) -> tuple[nn.Sequential, Observer]:
    """A model of two masked layers under a fresh copy of the criterion."""
    model = mlp(bias=False, **options)
    layers = {name: to_sparse_(model[int(name)]) for name in ("0", "2")}
    for layer in layers.values():
        layer.set_codes_(st.encode_tiles(st.transposable_mask(layer.weight.detach().abs())))
    observer = Observer(copy.deepcopy(criterion), layers)
    observer.attach()
    return model, observer


def statistics_of_a_rank() -> dict[str, Tensor]:
    """What a criterion knows on one of the ranks that each see one of the batches."""
    model, observer = observed(Wanda(beta=0.0))
    model(list(batches(0))[dist.get_rank()]).sum().backward()
    peers = Peers((None,))
    observer.note(dict.fromkeys(observer.layers, torch.zeros(())), None, peers)
    observer.count(peers)
    return cast("dict[str, Tensor]", observer.criterion.state_dict()["running"])


def batches(step: int, count: int = 2) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(6, 16, generator=generator) for _ in range(count))


def loss_of(output: Tensor, x: Tensor) -> Tensor:
    return (output - x.flip(1)).square().mean()


def numpy_step(
    model: nn.Sequential, micro_batches: list[Tensor], clip: float | None
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """Straight-through gradients and squared norms of the inputs of both layers, from the equations, in float64."""
    layers = [cast(MaskedLayer, model[place]) for place in (0, 2)]
    used = [(layer.weight.detach() * layer.mask).double().numpy() for layer in layers]
    gradients, norms = [np.zeros(()), np.zeros(())], [np.zeros(()), np.zeros(())]
    for batch in micro_batches:
        x = batch.double().numpy()
        hidden = np.tanh(x @ used[0].T)
        d_out = 2 * (hidden @ used[1].T - x[:, ::-1]) / x.size
        gradients[0] = gradients[0] + ((d_out @ used[1]) * (1 - hidden**2)).T @ x
        gradients[1] = gradients[1] + d_out.T @ hidden
        norms = [old + (value**2).sum(0) for old, value in zip(norms, (x, hidden), strict=True)]
    if clip is not None:
        total = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        gradients = [gradient * min(1.0, clip / (total + 1e-6)) for gradient in gradients]
    return gradients, norms
