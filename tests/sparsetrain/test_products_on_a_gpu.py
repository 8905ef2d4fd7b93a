"""Sparse products on a GPU: ``scripts/test -m gpu``. What cannot run there is skipped with the backend's own reason."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsetrain as st
from sparsetrain import products
from sparsetrain.backends import BACKENDS, Backend, CuSparseLtBackend
from sparsetrain.backends.cusparselt.providers import NvmathProvider, TorchProvider
from sparsetrain.backends.filling import Filling, fill_
from sparsetrain.dispatch import Choice, DispatchTable, Problem, Tuner, what_is_wrong
from sparsetrain.dispatch.stopwatch import median_milliseconds
from sparsetrain.operands import renew_

pytestmark = pytest.mark.gpu

O, I = 512, 768  # noqa: E741
TOKENS = [1, 8, 31, 63, 128, 4096 + 8]
HALVES = [torch.float16, torch.bfloat16]
CANDIDATES: dict[str, Backend] = {
    "nvmath": CuSparseLtBackend([NvmathProvider()]),
    "torch": CuSparseLtBackend([TorchProvider()]),
    **{name: backend for name, backend in BACKENDS.items() if name not in ("masked", "cusparselt")},
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))


@pytest.fixture(params=CANDIDATES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    found = CANDIDATES[request.param]
    reason = found.why_not(torch.device("cuda", 0), torch.bfloat16, (O, I))
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setitem(BACKENDS, found.name, found)
    return found


@pytest.fixture
def first_algorithm(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named backends run their default, so that nothing is measured."""

    class First:
        def choose(self, problem: Problem, device: torch.device, name: str, deterministic: bool) -> Choice:
            return Choice(name)

    monkeypatch.setattr(products, "tuner_for", lambda device: First())


def assert_as_exact_as_dense(found: Tensor, dense: Tensor, exact: Tensor) -> None:
    """At most twice the dense product's error against float64, or twice half a rounding step if that is less."""
    rounding = torch.finfo(found.dtype).eps * exact.abs().max() / 2
    allowed = 2 * torch.maximum((dense.double() - exact).abs().max(), rounding)
    assert (found.double() - exact).abs().max() <= allowed


def layer(backend: str, bias: bool = True) -> st.SparseLinear:
    model = nn.Sequential(nn.Linear(I, O, bias=bias)).cuda()
    st.sparsify_(model, backend=backend, verbose=False)
    return model[0]  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_products_are_as_exact_as_dense_ones(backend, first_algorithm, dtype, bias, tokens) -> None:
    sparse = layer(backend.name, bias)
    x = torch.randn(tokens, I, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = sparse(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = (sparse.weight.detach() * sparse.mask).to(dtype)
    half, added = x.detach().to(dtype), sparse.bias.detach().to(dtype) if bias else None
    assert_as_exact_as_dense(
        y, F.linear(half, weight, added), F.linear(half.double(), weight.double(), added.double() if bias else None)
    )  # fmt: skip
    assert_as_exact_as_dense(x.grad.to(dtype), dy @ weight, dy.double() @ weight.double())
    assert_as_exact_as_dense(sparse.weight.grad.to(dtype), dy.t() @ half, dy.double().t() @ half.double())


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_every_algorithm_is_right_twenty_times_or_denied(backend, product) -> None:
    device = torch.device("cuda", 0)
    problem = Problem(product, (O, I), 1024, torch.bfloat16)
    tuner = Tuner(DispatchTable(), "here", stopwatch=median_milliseconds,
                  backends={"masked": BACKENDS["masked"], backend.name: backend}, runs=20)  # fmt: skip
    decision = tuner.measure(problem, device)
    print(product, decision)
    offered = {str(choice) for choice in tuner.candidates(problem, device)}
    assert set(decision.milliseconds) | set(decision.denied) == offered
    weight = torch.randn(problem.matrix, device=device)
    codes = st.transposable_codes(weight.abs())
    matrix = (weight * st.decode_tiles(codes)).bfloat16()
    operand = backend.allocate(problem.matrix, torch.bfloat16, device)
    fill_([Filling(weight, codes, backend, torch.bfloat16, operand)])
    for name in decision.milliseconds:
        choice = Choice.parse(name)
        for _ in range(20 if choice.backend == backend.name else 0):
            rows = torch.randn(problem.rows, problem.matrix[1], device=device).bfloat16()
            reason = what_is_wrong(
                lambda x, choice=choice: backend.product(operand, x, None, choice.algorithm),
                lambda x: F.linear(x, matrix), matrix, rows,
            )  # fmt: skip
            assert reason is None, f"{name}: {reason}"


def test_our_packing_is_what_the_library_would_compress(backend) -> None:
    if backend.name != "cusparselt":
        pytest.skip(f"{backend.name} has no compressor to compare with")
    for rows, columns in ((128, 128), (256, 384), (512, 128), (64, 96)):
        weight = torch.randn(rows, columns, device="cuda")
        codes = st.transposable_codes(weight.abs())
        operand = backend.allocate((rows, columns), torch.bfloat16, torch.device("cuda", 0))
        fill_([Filling(weight, codes, backend, torch.bfloat16, operand)])
        print(rows, columns, operand.layout.name, operand.layout.reason)
        expected = backend.provider.compress((weight * st.decode_tiles(codes)).bfloat16())
        used = rows * columns * 9 // 16
        assert torch.equal(operand.tensors[0].flatten()[:used].view(torch.int16),
                           expected.flatten()[:used].view(torch.int16))  # fmt: skip


def test_inputs_of_any_strides_are_read(backend) -> None:
    sparse = layer(backend.name).half()
    operand = sparse.operands.get(sparse.weight, sparse.mask_codes, backend, False, torch.float16)
    whole = torch.randn(256, I + 64, device="cuda", dtype=torch.float16)
    dense = (sparse.weight.detach() * sparse.mask).double()
    for rows in (whole[:, :I], whole[:64, 8 : I + 8], whole[:64, 3 : I + 3], whole[:200, :I].t().contiguous().t()):
        for transposed in (False, True):
            found = backend.product(operand, rows, None, "", transposed)
            expected = rows.double() @ dense.t()
            torch.testing.assert_close(
                found.double(), expected.t() if transposed else expected, rtol=1e-2, atol=math.sqrt(I) * 1e-3
            )  # fmt: skip


def test_a_step_copies_no_activations_and_waits_for_nothing(backend, first_algorithm) -> None:
    sparse = layer(backend.name).bfloat16()
    x = torch.randn(8192, I, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(8192, O, device="cuda", dtype=torch.bfloat16)
    for mode in ("default", "error"):
        x.grad = sparse.weight.grad = sparse.bias.grad = None
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = sparse(x)
            forward = torch.cuda.max_memory_allocated() - before
            y.backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert forward <= y.numel() * 2 + x.numel() * 2 / 4 + (64 << 20)  # the result, workspaces, and no copy of x


def test_a_captured_step_follows_refreshes_and_repacks(backend, first_algorithm) -> None:
    sparse = layer(backend.name).bfloat16()
    x = torch.randn(512, I, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(512, O, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            sparse(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = sparse.weight.grad = sparse.bias.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sparse(x)
        y.backward(dy)
    for _ in range(3):
        with torch.no_grad():
            sparse.weight.copy_(torch.randn(O, I))
            sparse.set_codes_(st.transposable_codes(sparse.weight.abs().float()))
            x.copy_(torch.randn(512, I))
            x.grad.zero_()
        renew_([sparse.operands], [sparse.weight], [sparse.mask_codes])
        graph.replay()
        dense = (sparse.weight.detach() * sparse.mask).double()
        expected = F.linear(x.detach().double(), dense, sparse.bias.detach().double())
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=0.3)
        torch.testing.assert_close(x.grad.double(), dy.double() @ dense, rtol=2e-2, atol=0.3)


def test_compiled_layers_are_not_recompiled_by_refreshes_and_repacks(backend, first_algorithm) -> None:
    model = nn.Sequential(nn.Linear(I, O), nn.GELU(), nn.Linear(O, I)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    method = {"preset": "fst", "refresh_every": 2, "dense_tail": 0}
    training = st.SparseTraining(model, optimizer, method, 8, backend=backend.name, verbose=False)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(8):
        x = torch.randn(256, I, device="cuda")
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
        (w0, b0), (w1, b1) = ((entry.weight * entry.mask, entry.bias) for entry in (model[0], model[2]))
        expected = F.linear(F.gelu(F.linear(x, w0, b0)), w1, b1)
        torch.testing.assert_close(y.float(), expected.float(), rtol=5e-2, atol=5e-2)
        y.float().square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
    assert training.metrics()["violations"] == 0
    torch._dynamo.reset()


def test_automatic_dispatch_trains_as_masked_training_does() -> None:
    losses = {}
    for name in ("auto", "masked"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(I, O), nn.GELU(), nn.Linear(O, I)).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        method = {"preset": "fst", "refresh_every": 5, "dense_tail": 0}
        training = st.SparseTraining(model, optimizer, method, 30, backend=name, verbose=False)
        for step in range(30):
            x = torch.randn(2048, I, generator=torch.Generator().manual_seed(step)).cuda()
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (model(x) - x).float().square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
        print(training.report.sparse)
    assert losses["auto"] == pytest.approx(losses["masked"], rel=2e-2)
