"""What a layer and the engine do on the host, counted in calls of functions, as no test may assert a time."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_host import stand_in
from torch import nn

import sparsetrain as st
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.matmul.execution import Execution


def calls_of(function: Callable[[], object]) -> int:
    """Calls of Python's and of C's functions, in every thread of Python's that the caller waits for."""
    for _ in range(3):
        function()
    count = 0

    def profiler(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profiler)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def layer_of(backend: str) -> nn.Module:
    layer = to_sparse_(nn.Linear(16, 16), "sparse", Execution(backend))
    layer.set_codes_(search_tiles(layer.weight.detach(), True))
    return layer


@pytest.mark.parametrize(("backend", "forward", "both"), [("stand_in", 45, 80), ("masked", 60, 85)])
def test_a_layer_makes_few_calls(backend: str, forward: int, both: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    layer, dense = layer_of(backend), nn.Linear(16, 16)
    rows, gradient = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)
    assert calls_of(lambda: layer(rows)) - calls_of(lambda: dense(rows)) < forward
    over = calls_of(lambda: layer(rows).backward(gradient)) - calls_of(lambda: dense(rows).backward(gradient))
    assert over < both


@pytest.mark.parametrize("backend", ["stand_in", "masked"])
def test_no_signature_is_inspected(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    layer = layer_of(backend)
    layer(torch.randn(16, 16, requires_grad=True)).sum().backward()

    def forbidden(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a signature is inspected")

    monkeypatch.setattr(inspect, "signature", forbidden)
    layer(torch.randn(16, 16, requires_grad=True)).sum().backward()


METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "dense": ({"preset": "fst", "warmup": 10**6, "dense_tail": 0.0, "refresh_every": 10**6}, 7),
    "sparse": ({"preset": "fst", "warmup": 0.0, "dense_tail": 0.0, "refresh_every": 10**6}, 19),
    "frozen": ({"preset": "asp_one_shot", "prune_at": 0}, 24),
}


@pytest.mark.parametrize("phase", METHODS)
def test_a_step_with_nothing_due_makes_few_calls_a_layer(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = stand_in(monkeypatch)
    method, limit = METHODS[phase]
    count = 40
    counts = {}
    for kind in ("sparse", "bare"):
        model = nn.ModuleList(nn.Linear(16, 16 + 16 * (number % 2), bias=False) for number in range(count))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
        if kind == "sparse":
            st.SparseTraining(model, optimizer, method, 10**7, backend="stand_in", watch_dense=False, verbose=False)
        for layer in model:
            layer(torch.ones(16, 16, requires_grad=True)).sum().backward()
        launches.clear()
        counts[kind] = calls_of(optimizer.step)
        assert bool(launches) == (kind == "sparse" and phase != "dense")
    assert (counts["sparse"] - counts["bare"]) / count < limit


def test_a_layer_answers_wrong_arguments_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    for backend in ("stand_in", "masked"):
        layer = layer_of(backend)
        layer(torch.randn(2, 16))
        with pytest.raises(ValueError, match=r"input is \(2, 8\) and weight \(16, 16\)"):
            layer(torch.randn(2, 8))
        with pytest.raises(ValueError, match=r"input is \(\) and weight"):
            layer(torch.tensor(1.0))
        layer.mask_codes = layer.mask_codes[:2]
        with pytest.raises(ValueError, match="codes must be int16"):
            layer(torch.randn(2, 16))
    with pytest.raises(ValueError, match="they must be alike outside of autocast"):
        layer_of("stand_in")(torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="backend is 'nobody'"):
        layer_of("nobody")(torch.randn(2, 16))
