import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import mlp
from ranks import ranks
from simulated_backend import SimulatedBackend

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.distributed.equal_codes import require_equal_codes


def _worker(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    BACKENDS["simulated"] = SimulatedBackend()
    module = mlp()
    module.register_buffer("scale", torch.ones(1))  # data-parallel modules broadcast buffers
    model = torch.nn.parallel.DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = st.methods.fst(refresh_every=2, decay=0.01, dense_tail=0)
    training = st.SparseTraining(model, optimizer, method, 6, backend=backend, verbose=False)
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        optimizer.step()
    state = {name: codes.clone() for name, codes in training.masks.codes.items()}
    torch.save({"codes": state, "model": model.module.state_dict()}, f"{folder}/{rank}.pt")
    with torch.no_grad():
        model.module[2].weight.add_(torch.randn(16, 32) * rank)
    try:
        training.refresh()
        message = "no error"
    except RuntimeError as error:
        message = str(error)
    Path(folder, f"{rank}.txt").write_text(message)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an orderly exit


@pytest.mark.parametrize("backend", ["masked", pytest.param("simulated", marks=pytest.mark.sweep)])
def test_ranks_agree_on_masks_and_a_difference_is_an_error_on_every_rank(tmp_path: Path, backend: str) -> None:
    mp.spawn(_worker, (str(tmp_path), backend), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert list(first["codes"]) == ["0", "2"]
    for part in ("codes", "model"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    for rank in (0, 1):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert "masks of 2 differ between data-parallel ranks" in message


def _sparse_first(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = mlp()
    st.sparsify_(module, verbose=False)
    torch.nn.parallel.DistributedDataParallel(module)(torch.randn(4, 16)).sum().backward()
    Path(folder, f"{rank}.txt").write_text("done")
    dist.barrier()
    os._exit(0)


def test_sparse_layers_may_be_wrapped(tmp_path: Path) -> None:
    mp.spawn(_sparse_first, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text() == "done"


def test_one_process_compares_nothing() -> None:
    require_equal_codes({"fc": torch.zeros(1, 1, dtype=torch.int16)}, {"fc": ()})


@pytest.mark.parametrize("under_fsdp", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_adapters_are_clipped_by_the_same_norm_on_every_rank(micro_batches: int, under_fsdp: bool) -> None:
    first, second = ranks(2)("sharded_runs.clipped_adapters", micro_batches, under_fsdp)
    assert first[0] == second[0]
    assert all(map(torch.equal, first[1], second[1]))
    assert any(part.abs().sum() > 0 for part in first[1][1:14:2])  # adapters have moved
