"""Sparse products on a GPU: ``scripts/test -m gpu``. What cannot run there is skipped with the backend's own reason.

Where there is no GPU, the same lines run on stand-ins for the vendors' libraries, on less.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from gpu_checks import WORKSPACE, captured, most_bytes, peak_bytes, places_that_differ
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsetrain as st
from sparsetrain.backends import BACKENDS, Backend, CuSparseLtBackend
from sparsetrain.backends.cusparselt.backend import CompressedOperand
from sparsetrain.backends.cusparselt.providers import NvmathProvider, TorchProvider
from sparsetrain.backends.packing import PackJob, fill_
from sparsetrain.dispatch import Choice, DispatchTable, Problem, Product, Tuner, find_mismatch
from sparsetrain.dispatch.stopwatch import median_milliseconds
from sparsetrain.layers.masked_layer import MaskedLayer
from sparsetrain.matmul import choices
from sparsetrain.matmul.renewal import Renewal

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")

O, I = (512, 768) if ON_GPU else (64, 96)  # noqa: E741
TOKENS = [1, 8, 31, 63, 128, 4096 + 8] if ON_GPU else [1, 31, 136]
HALVES = [torch.float16, torch.bfloat16]
CANDIDATES: dict[str, Backend] = {
    "nvmath": CuSparseLtBackend([NvmathProvider()]),
    "torch": CuSparseLtBackend([TorchProvider()]),
    **{name: backend for name, backend in BACKENDS.items() if name not in ("masked", "cusparselt")},
}
STAND_INS = {"nvmath": "cusparselt", "torch": "cusparselt", "cutlass": "cutlass"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))


@pytest.fixture(params=CANDIDATES if ON_GPU else STAND_INS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Backend]:
    if ON_GPU:
        found = CANDIDATES[request.param]
        reason = found.why_not(DEVICE, torch.bfloat16, (O, I))
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setitem(BACKENDS, found.name, found)
        yield found
    else:
        from vendor_stand_ins import nvmath_stand_in, operator_stand_ins  # which import nvmath

        stand_in = nvmath_stand_in if request.param == "nvmath" else operator_stand_ins
        for _ in stand_in(monkeypatch, tmp_path):
            yield BACKENDS[STAND_INS[request.param]]


@pytest.fixture
def first_algorithm(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named backends run their default, so that nothing is measured."""

    class First:
        def choose(self, problem: Problem, device: torch.device, name: str, deterministic: bool) -> Choice:
            return Choice(name)

    monkeypatch.setattr(choices, "tuner_for", lambda device: First())


def assert_as_exact_as_dense(found: Tensor, dense: Tensor, exact: Tensor) -> None:
    """At most twice the dense product's error against float64, or twice half a rounding step if that is less."""
    rounding = torch.finfo(found.dtype).eps * exact.abs().max() / 2
    allowed = 2 * torch.maximum((dense.double() - exact).abs().max(), rounding)
    assert (found.double() - exact).abs().max() <= allowed


def layer(backend: str, bias: bool = True) -> st.SparseLinear:
    model = nn.Sequential(nn.Linear(I, O, bias=bias)).to(DEVICE)
    st.sparsify_(model, backend=backend, verbose=False)
    return cast(st.SparseLinear, model[0])


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_products_are_as_exact_as_dense_ones(
    backend: Backend, first_algorithm: None, dtype: torch.dtype, bias: bool, tokens: int
) -> None:
    sparse = layer(backend.name, bias)
    x = torch.randn(tokens, I, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, dtype):
        y = sparse(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    weight = (sparse.weight.detach() * sparse.mask).to(dtype)
    half, added = x.detach().to(dtype), sparse.bias.detach().to(dtype) if bias else None
    exact = F.linear(half.double(), weight.double(), None if added is None else added.double())
    assert_as_exact_as_dense(y, F.linear(half, weight, added), exact)
    assert_as_exact_as_dense(gradient(x).to(dtype), dy @ weight, dy.double() @ weight.double())
    assert_as_exact_as_dense(gradient(sparse.weight).to(dtype), dy.t() @ half, dy.double().t() @ half.double())


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_every_algorithm_is_right_twenty_times_or_denied(backend: Backend, product: Product) -> None:
    runs = 20 if ON_GPU else 2
    problem = Problem(product, (O, I), 1024 if ON_GPU else 64, torch.bfloat16)
    stopwatch = median_milliseconds if ON_GPU else call_once
    tuner = Tuner(DispatchTable(), "here", stopwatch=stopwatch,
                  backends={"masked": BACKENDS["masked"], backend.name: backend}, runs=runs)  # fmt: skip
    decision = tuner.measure(problem, DEVICE)
    print(product, decision)
    offered = {str(choice) for choice in tuner.candidates(problem, DEVICE)}
    assert set(decision.milliseconds) | set(decision.denied) == offered
    assert len(decision.milliseconds) > 1
    weight = torch.randn(problem.matrix, device=DEVICE)
    codes = st.transposable_codes(weight.abs())
    matrix = (weight * st.decode_tiles(codes)).bfloat16()
    operand = backend.allocate(problem.matrix, torch.bfloat16, DEVICE)
    fill_([PackJob(weight, codes, backend, torch.bfloat16, operand)])
    for name in decision.milliseconds:
        choice = Choice.parse(name)
        multiply = functools.partial(backend.product, operand, bias=None, algorithm=choice.algorithm)
        for _ in range(runs if choice.backend == backend.name else 0):
            rows = torch.randn(problem.rows, problem.matrix[1], device=DEVICE).bfloat16()
            reason = find_mismatch(multiply, functools.partial(F.linear, weight=matrix), matrix, rows)
            assert reason is None, f"{name}: {reason}"


def call_once(call: Callable[[], object]) -> float:
    """Where there is nothing to time, all are equally fast."""
    call()
    return 1.0


def test_our_packing_is_what_the_library_would_compress(backend: Backend) -> None:
    if not isinstance(backend, CuSparseLtBackend):
        pytest.skip(f"{backend.name} has no compressor to compare with")
    for rows, columns in ((128, 128), (256, 384), (512, 128), (64, 96)):
        weight = torch.randn(rows, columns, device=DEVICE)
        codes = st.transposable_codes(weight.abs())
        operand = backend.allocate((rows, columns), torch.bfloat16, DEVICE)
        assert isinstance(operand, CompressedOperand)
        assert operand.layout is not None
        fill_([PackJob(weight, codes, backend, torch.bfloat16, operand)])
        print(rows, columns, operand.layout.name, operand.layout.reason)
        if operand.layout.table is None:
            continue  # the library itself compressed it
        expected = backend.provider.compress((weight * st.decode_tiles(codes)).bfloat16())
        assert not places_that_differ(operand.tensors[0], expected, (rows, columns), operand.layout.table)


def test_inputs_of_any_strides_are_read(backend: Backend) -> None:
    sparse = layer(backend.name).half()
    operand = sparse.operands.get(sparse.weight, sparse.mask_codes, backend, "forward", torch.float16)
    whole = torch.randn(256, I + 64, device=DEVICE, dtype=torch.float16)
    dense = (sparse.weight.detach() * sparse.mask).double()
    for rows in (whole[:, :I], whole[:64, 8 : I + 8], whole[:64, 3 : I + 3], whole[:200, :I].t().contiguous().t()):
        for transposed in (False, True):
            found = backend.product(operand, rows, None, "", transposed)
            expected = rows.double() @ dense.t()
            torch.testing.assert_close(
                found.double(), expected.t() if transposed else expected, rtol=1e-2, atol=math.sqrt(I) * 1e-3
            )  # fmt: skip


def test_a_step_copies_no_activations_and_waits_for_nothing(backend: Backend, first_algorithm: None) -> None:
    tokens, workspace = (98304, WORKSPACE) if ON_GPU else (4096, 1 << 16)
    sparse = layer(backend.name).bfloat16()
    x = torch.randn(tokens, I, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(tokens, O, device=DEVICE, dtype=torch.bfloat16)
    outputs: list[Tensor] = []
    for mode in ("default", "error"):
        x.grad = sparse.weight.grad = cast(Tensor, sparse.bias).grad = None
        outputs.clear()
        with refusing_to_wait(mode):
            forward = peak_bytes(lambda: outputs.append(sparse(x)), DEVICE)
            outputs[0].backward(dy)
    # CUTLASS returns it transposed
    assert forward <= most_bytes(outputs[0], x, workspace, outputs=2 if backend.name == "cutlass" else 1)


@contextlib.contextmanager
def refusing_to_wait(mode: str) -> Iterator[None]:
    """Let whatever waits for the GPU raise, if the mode is ``"error"``."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_follows_refreshes_and_repacks(backend: Backend, first_algorithm: None) -> None:
    sparse = layer(backend.name).bfloat16()
    x = torch.randn(512, I, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(512, O, device=DEVICE, dtype=torch.bfloat16)

    def step() -> Tensor:
        output: Tensor = sparse(x)
        output.backward(dy)
        return output

    with warming_up():
        for _ in range(3):
            step()
    bias = cast(Tensor, sparse.bias)
    x.grad = sparse.weight.grad = bias.grad = None
    y, replay = captured(step, DEVICE)
    for _ in range(3):
        with torch.no_grad():
            sparse.weight.copy_(torch.randn(O, I))
            sparse.set_codes_(st.transposable_codes(sparse.weight.abs().float()))
            x.copy_(torch.randn(512, I))
            gradient(x).zero_()
        Renewal([sparse]).repack_()
        replay()
        dense = (sparse.weight.detach() * sparse.mask).double()
        expected = F.linear(x.detach().double(), dense, bias.detach().double())
        torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=0.3)
        torch.testing.assert_close(gradient(x).double(), dy.double() @ dense, rtol=2e-2, atol=0.3)


@contextlib.contextmanager
def warming_up() -> Iterator[None]:
    """What comes before a capture runs on a stream of its own."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def test_compiled_layers_are_not_recompiled_by_refreshes_and_repacks(backend: Backend, first_algorithm: None) -> None:
    model = nn.Sequential(nn.Linear(I, O), nn.GELU(), nn.Linear(O, I)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    method = {"preset": "fst", "refresh_every": 2, "dense_tail": 0}
    training = st.SparseTraining(model, optimizer, method, 8, backend=backend.name, verbose=False)
    counter = CompileCounterWithBackend("inductor" if ON_GPU else "aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(8):
        x = torch.randn(256, I, device=DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = compiled(x)
        (w0, b0), (w1, b1) = map(masked_weight_and_bias, (model[0], model[2]))
        expected = F.linear(F.gelu(F.linear(x, w0, b0)), w1, b1)
        torch.testing.assert_close(y.float(), expected.float(), rtol=5e-2, atol=5e-2)
        y.float().square().mean().backward()
        optimizer.step()
    assert counter.frame_count == 1
    assert training.metrics()["violations"] == 0
    torch._dynamo.reset()


def masked_weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    assert isinstance(layer, MaskedLayer)
    return layer.weight * layer.mask, layer.bias


def test_automatic_dispatch_trains_as_masked_training_does() -> None:
    losses = {}
    for name in ("auto", "masked"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(I, O), nn.GELU(), nn.Linear(O, I)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        method = {"preset": "fst", "refresh_every": 5, "dense_tail": 0}
        training = st.SparseTraining(model, optimizer, method, 30, backend=name, verbose=False)
        for step in range(30):
            x = torch.randn(2048, I, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = (model(x) - x).float().square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
        print(training.report.sparse)
    assert losses["auto"] == pytest.approx(losses["masked"], rel=2e-2)
