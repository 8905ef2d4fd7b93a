"""What ranks do with whole models under ``DistributedDataParallel`` (``test_ranks.py``)."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from models import mlp
from ranks import failure
from simulated_backend import SimulatedBackend
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st
from sparsetrain.backends import BACKENDS


def trained_then_changed(backend: str) -> dict[str, Any]:
    """Return codes and weights of a trained replica, and what a search says once the second was written to."""
    torch.manual_seed(0)
    module = mlp()
    module.register_buffer("scale", torch.ones(1))  # data-parallel modules broadcast buffers
    model, rank = DistributedDataParallel(module), dist.get_rank()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = st.methods.fst(refresh_every=2, decay=0.01, dense_tail=0)
    with patch.dict(BACKENDS, simulated=SimulatedBackend()):
        training = st.SparseTraining(model, optimizer, method, 6, backend=backend, verbose=False)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().mean().backward()
            optimizer.step()
        codes = {name: codes.clone() for name, codes in training.masks.codes.items()}
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        with torch.no_grad():
            module.get_parameter("2.weight").add_(torch.randn(16, 32) * rank)
        return {"codes": codes, "weights": weights, "message": failure(training.refresh)}


def wrapped_when_sparse() -> Tensor:
    """Return the gradient of a model that was sparse before it was wrapped, on inputs of this rank's own."""
    torch.manual_seed(0)
    module = mlp()
    st.sparsify_(module, verbose=False)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(dist.get_rank()))
    model = DistributedDataParallel(module)
    model(x).sum().backward()
    gradient = module[0].weight.grad
    assert isinstance(gradient, Tensor)
    return gradient
