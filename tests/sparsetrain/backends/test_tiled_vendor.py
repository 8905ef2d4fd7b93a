"""cuSPARSELt as newer GPUs may have it: padding inside tiles, no workspace, late refusals, a fault now and then."""

import itertools
import logging
import operator
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS, CuSparseLtBackend
from sparsetrain.backends.cusparselt import CuSparseLt, Library
from sparsetrain.backends.cusparselt import metadata_layout as layouts
from sparsetrain.backends.cusparselt.providers import NvmathProvider
from sparsetrain.backends.packing import PackJob, fill_
from sparsetrain.dispatch import DispatchTable, Tuner
from sparsetrain.matmul import choices

pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")
from fake_cusparselt import FakeDevices
from tiled_vendor import TiledCuSparseLt

CPU = torch.device("cpu")
ORDERS = {"cutlass": "cutlass_sm90_4", "pitched": "learned"}


class OpenBackend(CuSparseLtBackend):
    """As if this machine had a GPU."""

    def why_not(self, device, dtype, shape):
        return (
            None if dtype in (torch.float16, torch.bfloat16) else f"dtype is {dtype}: it must be float16 or bfloat16."
        )


@pytest.fixture(params=list(ORDERS))
def vendor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[TiledCuSparseLt]:
    devices = FakeDevices()
    tiled = TiledCuSparseLt(devices, request.param)
    library = CuSparseLt(Library(tiled), devices)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(layouts, "_decisions", {})
    monkeypatch.setitem(BACKENDS, "cusparselt", OpenBackend([NvmathProvider(library)]))
    yield tiled
    tiled.fault_every = 0
    library.close()
    tiled.assert_clean()


def train(backend: str, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], nn.Sequential]:
    """Outputs and input gradients of some steps, with masks that move every second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=False), nn.Linear(64, 96, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method = {"preset": "fst", "dense_tail": 0, "refresh_every": 2, "decay": 1e-2}
    st.SparseTraining(model, optimizer, method, 20, backend=backend, verbose=False)
    found = []
    for _ in range(steps):
        x = torch.randn(16, 96, requires_grad=True)
        with torch.autocast("cpu", dtype):
            y = model(x)
        optimizer.zero_grad()
        y.float().square().mean().backward()
        optimizer.step()
        found += [y.detach().float(), x.grad]
    return found, model


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) < 0.03 * scale


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (128, 128)])
def test_its_order_is_found_and_written_by_the_packer(vendor: TiledCuSparseLt, shape: tuple[int, int]) -> None:
    backend = BACKENDS["cusparselt"]
    operand, weight = backend.allocate(shape, torch.float16, CPU), torch.randn(shape)
    assert operand.layout.name == ORDERS[vendor.order], operand.layout.reason
    assert operand.meta is not None  # nothing is re-ordered after packing
    compressed = vendor.calls["sp_mma_compress2"]
    codes = st.transposable_codes(weight.abs())
    fill_([PackJob(weight, codes, backend, torch.float16, operand)])
    assert vendor.calls["sp_mma_compress2"] == compressed
    matrix = {"rows": shape[0], "cols": shape[1], "dtype": torch.float16}
    found = vendor.read(operand.tensors[0].data_ptr(), matrix)
    assert torch.equal(found, (weight * st.decode_tiles(codes)).half())
    again = backend.allocate(shape, torch.float16, CPU)
    assert vendor.calls["sp_mma_compress2"] == compressed
    assert again.tensors[0].numel() == backend.provider.compress(found).numel()


def test_training_equals_that_of_masked_products(vendor: TiledCuSparseLt) -> None:
    found, model = train("cusparselt")
    compressed = vendor.calls["sp_mma_compress2"]
    assert vendor.calls["matmul"] == 20
    close(found, train("masked")[0])
    assert vendor.calls["sp_mma_compress2"] == compressed
    assert {launch.workspace for launch in vendor.launches} == {0}
    assert {made.layout.name for layer in model for made in layer.operands._made.values()} == {ORDERS[vendor.order]}


def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """``backend="auto"`` on a CPU, where every product of cuSPARSELt is faster than the dense one."""
    milliseconds = itertools.accumulate(itertools.repeat(0.5), operator.mul)  # the later, the faster
    tuner = Tuner(DispatchTable(), "here", stopwatch=lambda call: (call(), next(milliseconds))[1], runs=1)
    monkeypatch.setattr(choices, "tuner_for", lambda device: tuner)
    monkeypatch.setattr(choices, "AUTO_DEVICES", ("cpu",))


@pytest.mark.parametrize("vendor", ["pitched"], indirect=True)
def test_algorithms_refused_at_the_product_are_not_chosen(
    vendor: TiledCuSparseLt, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic(monkeypatch)
    vendor.refuses = {None, 0, 1, 2}
    found, _ = train("auto")
    assert {launch.config_id for launch in vendor.launches[-10:]} - vendor.refuses == {vendor.launches[-1].config_id}
    close(found, train("masked")[0])


@pytest.mark.parametrize("vendor", ["pitched"], indirect=True)
def test_what_is_refused_later_becomes_dense_with_the_reason(
    vendor: TiledCuSparseLt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    automatic(monkeypatch)
    train("auto", steps=1)
    vendor.refuses = {None, *range(20)}
    launched = len(vendor.launches)
    found, model = train("auto")
    assert len(vendor.launches) == launched
    close(found, train("masked")[0])
    assert any("is not supported" in record.getMessage() for record in caplog.records)
    assert all("masked" in layer.describe_products() for layer in model)


@pytest.mark.parametrize("vendor", ["cutlass"], indirect=True)
@pytest.mark.parametrize("every", [2, 3, 7])
def test_faults_now_and_then_give_no_wrong_numbers(
    vendor: TiledCuSparseLt, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    automatic(monkeypatch)
    vendor.fault_every = every
    close(train("auto")[0], train("masked")[0])


@pytest.mark.parametrize("vendor", ["pitched"], indirect=True)
def test_a_compressor_that_fails_is_named_in_the_reason(vendor: TiledCuSparseLt) -> None:
    backend = BACKENDS["cusparselt"]
    vendor.fault_every = 2
    layout = backend.allocate((64, 96), torch.float16, CPU).layout
    assert layout.name == "vendor"
    assert layout.reason.startswith("The vendor's compressor failed: ")
    assert "illegal memory access" in layout.reason


@pytest.mark.parametrize("vendor", ["pitched"], indirect=True)
def test_a_vendor_that_compresses_itself_and_fails_leaves_the_run_alone(
    vendor: TiledCuSparseLt, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    automatic(monkeypatch)
    caplog.set_level(logging.WARNING, logger="sparsetrain")
    monkeypatch.setattr(layouts, "_decide", lambda *_: ("vendor", "because.", None))
    train("auto", steps=1)
    vendor.fault_every = 3
    close(train("auto")[0], train("masked")[0])
    assert any("cannot be packed now" in record.getMessage() for record in caplog.records)
