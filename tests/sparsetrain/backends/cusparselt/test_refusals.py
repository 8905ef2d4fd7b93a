"""What the wrapper of cuSPARSELt refuses, before any call of the library."""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cusparselt_bench import Bench, C, N, R, normal, sparse
from fake_cusparselt import FakeError
from torch import Tensor

from sparsetrain.backends.cusparselt import CuSparseLt
from sparsetrain.backends.cusparselt.session_pool import default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (R, C + 8)}, r"shape is \(32, 56\): .*multiples of 16"),
        ({"shape": (0, C)}, "shape is .*positive multiples of 16"),
        ({"dense": normal(C, 12)}, r"dense is \(48, 12\): it must be \[48, N\] .* multiple of 8"),
        ({"dense": normal(C, 0)}, "dense is .*positive multiple of 8"),
        ({"dense": normal(C + 16, N)}, r"dense is \(64, 24\): it must be \[48, N\]"),
        ({"dense": normal(2, C, N)}, r"dense is \(2, 48, 24\): it must be"),
        ({"dense": normal(C, 2 * N)[:, ::2]}, r"dense has strides \(48, 2\): .*contiguous"),
        ({"dense": normal(C, N + 4)[:, :N]}, r"dense has strides \(28, 1\): .*multiple of 8"),
        ({"dense": normal(1, N).expand(C, N)}, r"dense has strides \(0, 1\): .*without overlap"),
        ({"dense": normal(C * N + 1)[1:].view(C, N)}, r"dense is at address 0x\w+: .*multiple of 16 bytes"),
        ({"dense": normal(C, N).float(), "compressed": normal(8).float()}, "dtype is torch.float32: .*bfloat16"),
        ({"dense": normal(C, N).bfloat16()}, "compressed is torch.float16 .*must be torch.bfloat16"),
        ({"compressed": normal(4000)[::2]}, "compressed is .*contiguous"),
        ({"bias": normal(R).float()}, "bias is torch.float32 .*must be torch.float16"),
        ({"bias": normal(R + 8)}, r"bias is torch.float16 \(40,\).*must be torch.float16 \(32,\)"),
        ({"bias": normal(2 * R)[::2]}, r"bias is .*strides \(2,\).*contiguous"),
        ({"bias": normal(R + 1)[1:]}, "bias is at address"),
        ({"output": "column"}, r"output is 'column': it must be one of \['columns', 'rows'\]"),
    ],
)
def test_an_operand_that_does_not_fit_is_named_before_any_library_call(
    bench: Bench, arguments: dict[str, Any], message: str
) -> None:
    call = {"compressed": normal(4000), "shape": (R, C), "dense": normal(C, N), **arguments}
    with pytest.raises(ValueError, match=message):
        bench.lt.multiply(**call)
    assert not bench.fake.calls


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        (sparse(R, C + 16)[:, :C].float(), "dtype is torch.float32"),
        (torch.zeros(R, 24).half(), r"shape is \(32, 24\)"),
        (torch.zeros(R, C, 1).half(), r"shape is \(32, 48, 1\)"),
        (sparse(C, R).t(), r"dense has strides \(1, 32\): its rows must be contiguous"),
        (torch.zeros(R, C + 8).half()[:, :C], r"dense has strides \(56, 1\): .*multiple of 16"),
        (torch.zeros(R * C + 4).half()[4:].view(R, C), "dense is at address"),
    ],
)
def test_a_matrix_that_cannot_be_compressed_is_named(bench: Bench, dense: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.lt.compress(dense)
    assert not bench.fake.calls


def test_a_wrong_buffer_or_matrix_or_device_is_named(bench: Bench) -> None:
    compressed, dense, bias = bench.lt.compress(sparse()), normal(C, N), normal(R)
    kept = compressed.clone()
    wrong = [torch.zeros(8).half(), kept.bfloat16(), kept.repeat_interleave(2)[::2], F.pad(kept, (1, 0))[1:]]
    for out in wrong:
        with pytest.raises(ValueError, match=r"out is torch\..*give what compress"):
            bench.lt.compress(sparse(), out=out)
    bench.devices.elsewhere = {id(kept): 1}
    with pytest.raises(ValueError, match=r"out is torch\..*give what compress"):
        bench.lt.compress(sparse(seed=3), out=kept)
    assert torch.equal(kept, compressed)
    with pytest.raises(ValueError, match=r"compressed has \d+ elements: a matrix \(48, 48\) has"):
        bench.lt.multiply(compressed, (48, C), dense)
    for tensor in (compressed, bias):
        bench.devices.elsewhere = {id(tensor): 1}
        with pytest.raises(ValueError, match="must be on one device"):
            bench.lt.multiply(compressed, (R, C), dense, bias=bias)
    assert not bench.fake.launches
    with pytest.raises(ValueError, match="capacity is 0"):
        CuSparseLt(capacity=0)


def test_a_tensor_on_the_cpu_needs_another_backend() -> None:
    with pytest.raises(ValueError, match="dense is on cpu: it must be on a CUDA device"):
        default().compress(sparse())


def test_a_library_that_does_not_start_says_what_it_needs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise FakeError("CUDA driver is not found")

    monkeypatch.setattr(bench.fake, "init", fail)
    with pytest.raises(RuntimeError, match=r"cannot start \(CUDA driver is not found\): it needs an NVIDIA driver"):
        bench.lt.compress(sparse())


class Absent(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "nvmath":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_nvmath_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "nvmath"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=r'the cuSPARSELt backend needs nvmath: pip install "sparsetrain\[cuda\]"'):
        CuSparseLt().version()
