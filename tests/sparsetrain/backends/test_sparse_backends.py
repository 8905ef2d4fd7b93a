"""Backends of vendors on stand-ins: the cuSPARSELt of ``fake_cusparselt``, and PyTorch's operators, all on a CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS, Backend, CutlassBackend
from sparsetrain.backends.cusparselt import metadata_layout as layouts
from sparsetrain.backends.cusparselt.providers import TorchProvider
from sparsetrain.backends.packing import PackJob, fill_

pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")
from fake_cusparselt import FakeCuSparseLt
from vendor_stand_ins import HALVES, nvmath_stand_in, operator_stand_ins

TOKENS = [1, 8, 31, 63, 128, 136]


@pytest.fixture
def nvmath(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeCuSparseLt]:
    yield from nvmath_stand_in(monkeypatch, tmp_path)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, list[object]]]:
    yield from operator_stand_ins(monkeypatch, tmp_path)


@pytest.fixture(params=["nvmath", "torch", "cutlass"])
def backend(request: pytest.FixtureRequest) -> Backend:
    request.getfixturevalue("nvmath" if request.param == "nvmath" else "operators")
    return BACKENDS["cutlass" if request.param == "cutlass" else "cusparselt"]


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 2e-2 if found.dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_products_equal_the_dense_ones(backend, dtype, bias, tokens) -> None:
    model = nn.Sequential(nn.Linear(128, 64, bias=bias))
    st.sparsify_(model, backend=backend.name, verbose=False)
    x = torch.randn(tokens, 128, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = model(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    dense = model[0].weight.detach() * model[0].mask
    assert y.is_contiguous()
    close(y, F.linear(x.detach().double(), dense.double(), model[0].bias.double() if bias else None))
    close(x.grad.to(dtype), dy.double() @ dense.double())
    close(model[0].weight.grad.to(dtype), dy.double().t() @ x.detach().double())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_outputs_come_in_both_orders_from_inputs_of_any_strides(backend, dtype, transposed) -> None:
    weight = torch.randn(64, 128)
    codes = st.transposable_codes(weight.abs())
    dense = (weight * st.decode_tiles(codes)).to(dtype)
    operand = backend.allocate((64, 128), dtype, torch.device("cpu"))
    fill_([PackJob(weight, codes, backend, dtype, operand)])
    bias = torch.randn(64, dtype=dtype)
    whole = torch.randn(48, 272, dtype=dtype)
    for rows in (whole[:16, :128], whole[:, 8:136], whole[:20, 1:129], whole.t()[:128, :24].t(), whole[::2, :128],
                 whole[:1, :128].expand(24, 128)):  # fmt: skip
        found = backend.product(operand, rows, bias, "", transposed)
        assert found.is_contiguous()
        close(found, (F.linear(rows.double(), dense.double(), bias.double())).t() if transposed
              else F.linear(rows.double(), dense.double(), bias.double()))  # fmt: skip


def test_our_packer_writes_the_order_that_was_learned_from_the_compressor(nvmath) -> None:
    backend = BACKENDS["cusparselt"]
    weight = torch.randn(48, 64)
    codes = st.transposable_codes(weight.abs())
    operand = backend.allocate((48, 64), torch.float16, torch.device("cpu"))
    assert operand.layout.name == "learned"
    count = nvmath.calls["sp_mma_compress2"]
    fill_([PackJob(weight, codes, backend, torch.float16, operand)])
    assert nvmath.calls["sp_mma_compress2"] == count
    expected = backend.provider.compress((weight * st.decode_tiles(codes)).half())
    assert torch.equal(operand.tensors[0].view(torch.int16), expected.view(torch.int16))


def test_an_order_that_cannot_be_learned_is_left_to_the_vendor(nvmath, monkeypatch) -> None:
    backend = BACKENDS["cusparselt"]
    monkeypatch.setattr(layouts, "_decide", lambda *_: ("vendor", "because.", None))
    model = nn.Sequential(nn.Linear(64, 48))
    st.sparsify_(model, backend="cusparselt", verbose=False)
    addresses = set()
    for _ in range(3):
        x = torch.randn(8, 64, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.backward(torch.ones_like(y))
        dense = model[0].weight.detach() * model[0].mask
        close(y, F.linear(x.detach(), dense, model[0].bias))
        close(x.grad.bfloat16(), torch.ones(8, 48) @ dense)
        addresses.add(tuple(operand.tensors[0].data_ptr() for operand in model[0].operands._made.values()))
        with torch.no_grad():
            model[0].weight.add_(torch.randn(48, 64))
    assert len(addresses) == 1
    assert {operand.layout.name for operand in model[0].operands._made.values()} == {"vendor"}
    assert backend.provider.name == "nvmath"


@pytest.mark.parametrize("order", ["learned", "vendor"])
def test_input_gradients_of_weights_that_are_pruned_twice(nvmath, monkeypatch, order: str) -> None:
    if order == "vendor":
        monkeypatch.setattr(layouts, "_decide", lambda *_: ("vendor", "because.", None))
    model = nn.Sequential(nn.Linear(64, 48))
    method = {"preset": "slope", "refresh_every": 2, "adapter_rank": 0}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    st.SparseTraining(model, optimizer, method, 6, backend="cusparselt", verbose=False)
    for _ in range(5):
        x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 48)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.backward(dy.bfloat16())
        kept = model[0].mask & st.decode_tiles(model[0].backward_codes)
        close(y, F.linear(x.detach().bfloat16(), model[0].weight.bfloat16(), model[0].bias.bfloat16()))
        close(x.grad.bfloat16(), dy.bfloat16() @ (model[0].weight * kept).bfloat16())
        optimizer.step()
    assert {operand.layout.name for operand in model[0].operands._made.values()} == {order}
    assert len(model[0].operands._made) == 2


def test_plans_are_made_once_for_steps_micro_batches_and_a_bias_that_is_cast(nvmath) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    st.sparsify_(model, backend="cusparselt", verbose=False)
    optimizer = torch.optim.AdamW(model.parameters())
    counts = []
    for _ in range(3):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(torch.randn(32, 64, requires_grad=True)).float().sum().backward()
        optimizer.step()
        counts.append(nvmath.calls["matmul_plan_init"])
    assert counts == [2, 2, 2]  # forward and input gradient
    assert nvmath.calls["matmul"] == 12


def test_every_algorithm_of_the_library_is_offered_and_passed_on(nvmath) -> None:
    backend, cpu = BACKENDS["cusparselt"], torch.device("cpu")
    names = backend.algorithms((32, 64), 100, torch.float16, cpu)
    assert names[:3] == ("", "0", "1")
    operand = backend.allocate((32, 64), torch.float16, cpu)
    for name in names:
        backend.product(operand, torch.randn(8, 64, dtype=torch.float16), None, name)
    assert [launch.config_id for launch in nvmath.launches] == [None, *range(len(names) - 1)]


def test_algorithms_of_torchs_operator_are_passed_on(operators) -> None:
    backend, cpu = BACKENDS["cusparselt"], torch.device("cpu")
    operand = backend.allocate((32, 64), torch.float16, cpu)
    for name in ("", "5"):
        backend.product(operand, torch.randn(8, 64, dtype=torch.float16), None, name)
    assert operators["alg_id"] == [0, 5]


@pytest.mark.parametrize("name", ["cusparselt", "cutlass"])
def test_without_a_gpu_a_backend_says_so_in_one_sentence(name: str) -> None:
    reason = BACKENDS[name].why_not(torch.device("cpu"), torch.bfloat16, (64, 64))
    assert reason is not None
    assert reason.count(". ") == 0
    assert "GPU" in reason


def test_a_missing_operator_gives_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.backends.cusparselt.providers.cslt_compress", None)
    monkeypatch.setattr("sparsetrain.backends.cutlass.semi_structured_mm", None)
    for reason in (TorchProvider().why_not(), CutlassBackend().why_not(torch.device("cpu"), torch.float16, (64, 64))):
        assert reason is not None
        assert "no operator aten::_" in reason
