"""Steps in which nothing is due wait for no device: neither their operators nor their tables of addresses do."""

from typing import Any

import pytest
import torch
from gpu_host import Waits, host_reads, stand_in
from torch import nn

import sparsetrain as st

STEPS = 50
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "recommended, sparse": ("sparse", {"preset": "recommended", "warmup": 0.0, "freeze": 0.0, "refresh_every": 10**6}),
    "recommended, frozen": ("frozen", {"preset": "recommended", "warmup": 2, "freeze": 10**7 - 4}),
    "fst, sparse": ("sparse", {"preset": "fst", "dense_tail": 0.0, "refresh_every": 10**6}),
    "fst, dense": ("dense", {"preset": "fst", "warmup": 10**6, "dense_tail": 0.0, "refresh_every": 10**6}),
    "one-shot, frozen": ("frozen", {"preset": "asp_one_shot", "prune_at": 0}),
}


def model_and_optimizer() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    shapes = [(16, 32), (32, 32), (32, 32), (32, 16)]
    model = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for columns, rows in shapes))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, kept: list[torch.Tensor]) -> None:
    """One step whose gradients lie where no gradient lay before, as an allocator may place them."""
    optimizer.zero_grad(set_to_none=True)
    model(torch.ones(8, 16)).sum().backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad.clone()
        kept.append(parameter.grad)
    optimizer.step()


@pytest.mark.parametrize("seen_by_a_mode", [False, True], ids=["direct", "dispatched"])
@pytest.mark.parametrize("name", METHODS)
def test_steady_steps_wait_for_nothing(name: str, seen_by_a_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    phase, method = METHODS[name]
    launches = stand_in(monkeypatch)
    model, optimizer = model_and_optimizer()
    training = st.SparseTraining(model, optimizer, method, 10**7, backend="stand_in", verbose=False)
    kept: list[torch.Tensor] = []
    while training.clock < 5:
        step(model, optimizer, kept)
    assert training.phase == phase
    launches.clear()
    # the counts of steps that optimizers read lie on the host, on a GPU too
    counts = lambda: {state["step"].data_ptr() for state in optimizer.state.values()}  # noqa: E731
    waits = Waits(counts)
    with host_reads(monkeypatch) as reads:
        if seen_by_a_mode:
            with waits:
                for _ in range(STEPS):
                    step(model, optimizer, kept)
        else:
            copied = copies_from_pageable_memory(monkeypatch)
            for _ in range(STEPS):
                step(model, optimizer, kept)
            assert not copied
    assert not waits.counts
    assert not reads
    masked = phase != "dense"
    assert ("masked_update_kernel" in launches) == masked  # the counting saw what it should
    assert any("pack" in kernel for kernel in launches) == masked


def copies_from_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors that are made of Python's numbers, which lie in pageable memory; no operator tells of them."""
    found: list[str] = []
    for name in ("tensor", "as_tensor", "from_numpy"):
        real = getattr(torch, name)

        def counted(*arguments: Any, _real: Any = real, _name: str = name, **keywords: Any) -> Any:
            found.append(_name)
            return _real(*arguments, **keywords)

        monkeypatch.setattr(torch, name, counted)
    return found
