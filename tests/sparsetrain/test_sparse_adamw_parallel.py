"""``SparseAdamW`` where others wrap the model and the optimizer: Accelerate, and data-parallel ranks."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st
from sparsetrain.optim import SparseAdamW

METHOD = {"preset": "fst", "warmup": 2, "dense_tail": 0.0, "refresh_every": 3, "decay": 0.05}
STEPS = 8


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def batch(step: int) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def plain_run(kind: type[torch.optim.AdamW]) -> list[Tensor]:
    network = model()
    optimizer = kind(network.parameters(), lr=1e-2)
    training = st.SparseTraining(network, optimizer, METHOD, STEPS, verbose=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        network(batch(step)).square().mean().backward()
        optimizer.step()
    assert training.masks.exists
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_accelerate_trains_as_without_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    network = model()
    network, optimizer = accelerator.prepare(network, SparseAdamW(network.parameters(), lr=1e-2))
    st.SparseTraining(network, optimizer, METHOD, STEPS, verbose=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(network(batch(step)).square().mean())
        optimizer.step()
    assert all(map(torch.equal, network.parameters(), plain_run(torch.optim.AdamW)))


def _rank(rank: int, folder: str) -> None:
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=limit, rank=rank, world_size=2)
    network = DistributedDataParallel(model())
    optimizer = SparseAdamW(network.parameters(), lr=1e-2)
    st.SparseTraining(network, optimizer, METHOD, STEPS, verbose=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        network(batch(step)).square().mean().backward()  # the same on both ranks: their mean is the one-process run's
        optimizer.step()
    torch.save([parameter.detach() for parameter in network.parameters()], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.sweep
def test_data_parallel_ranks_train_as_one_process(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    expected = plain_run(torch.optim.AdamW)
    for rank in range(2):
        assert all(map(torch.equal, torch.load(tmp_path / f"{rank}.pt"), expected))
