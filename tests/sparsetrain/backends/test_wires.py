"""Operands of every backend filled from wires, against those that are packed from the masked weight."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels_on_cpu import kernels_on_cpu
from simulated_backend import SimulatedBackend
from torch import Tensor

from sparsetrain.backends import BACKENDS, Backend, Operand
from sparsetrain.backends.cusparselt import metadata_layout as layouts
from sparsetrain.backends.packing import PackJob, fill_
from sparsetrain.backends.wires import WireJob, fill_from_wires_
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.wire import pack_operator, to_wire

pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")
from vendor_stand_ins import HALVES, nvmath_stand_in, operator_stand_ins

CPU = torch.device("cpu")
SHAPES = [(64, 128), (128, 64), (64, 128)]


@pytest.fixture(params=["nvmath", "vendor", "cutlass", "masked", "simulated", "natural"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Backend]:
    if request.param in ("nvmath", "vendor"):
        stand_in = nvmath_stand_in(monkeypatch, tmp_path)
        next(stand_in)
        if request.param == "vendor":
            monkeypatch.setattr(layouts, "_decide", lambda *_: ("vendor", "because.", None))
        yield BACKENDS["cusparselt"]
        next(stand_in, None)
    elif request.param == "cutlass":
        stand_in = operator_stand_ins(monkeypatch, tmp_path)
        next(stand_in)
        yield BACKENDS["cutlass"]
        next(stand_in, None)
    else:
        yield BACKENDS["masked"] if request.param == "masked" else SimulatedBackend(request.param == "natural")


def operands(backend: Backend, shape: tuple[int, int], dtype: torch.dtype, sides: tuple[bool, bool]) -> list:
    shapes = (shape, shape[::-1])
    return [backend.allocate(size, dtype, CPU) if side else None for size, side in zip(shapes, sides, strict=True)]


def bits(operand: Operand | None) -> list[Tensor]:
    return [] if operand is None else [tensor.contiguous().view(torch.int16) for tensor in operand.tensors]


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize(
    ("dtype", "sides"),
    [*((dtype, (True, True)) for dtype in HALVES), (HALVES[0], (True, False)), (HALVES[1], (False, True))],
)
def test_wires_fill_operands_as_masked_weights_do(backend, dtype, sides, by_kernels, monkeypatch) -> None:
    weights = [torch.randn(shape) for shape in SHAPES]
    weights[0][:4] = -0.0
    codes = [search_tiles(weight, magnitude=True) for weight in weights]
    expected = [operands(backend, shape, dtype, sides) for shape in SHAPES]
    found = [operands(backend, shape, dtype, sides) for shape in SHAPES]
    columns = zip(weights, codes, expected, strict=True)
    fill_([PackJob(weight, code, backend, dtype, *pair) for weight, code, pair in columns])
    wires = [to_wire(weight, code, dtype) for weight, code in zip(weights, codes, strict=True)]
    jobs = [
        WireJob(*wire, backend=backend, operand=pair[0], transpose=pair[1])
        for wire, pair in zip(wires, found, strict=True)
    ]
    if by_kernels:
        monkeypatch.setitem(pack_operator.NOW, "cpu", pack_operator.NOW["cuda"])
        with kernels_on_cpu() as launches:
            fill_from_wires_(jobs)
        packed = all(pair is None or pair.values is not None for pairs in found for pair in pairs)
        assert launches.names.count("pack_wire_kernel") == (2 if packed else 0)
        assert launches.names.count("from_wire_kernel") == (0 if packed else 3)
    else:
        fill_from_wires_(jobs)
    for some, others in zip(found, expected, strict=True):
        for one, other in zip(some, others, strict=True):
            assert all(map(torch.equal, bits(one), bits(other)))


def test_a_wire_that_does_not_fit_is_refused_and_nothing_is_written() -> None:
    backend = SimulatedBackend(native=True)
    wire = to_wire(torch.randn(16, 16), search_tiles(torch.randn(16, 16)), torch.float16)
    operand = backend.allocate((16, 32), torch.float16, CPU)
    with pytest.raises(ValueError, match=r"values\[0\] is torch.float16 \(16, 16\) .* \(16, 8\)"):
        fill_from_wires_([WireJob(*wire, backend=backend, operand=operand)])
    assert operand.tensors[0].isnan().all()
    fill_from_wires_([])
