"""What the tests on a GPU would notice, shown on a CPU with planted faults; and what they must not stumble over."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checks import assert_same_gradients, most_bytes, peak_bytes, places_that_differ
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.kernels.layouts import LearnedLayout

pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")
from vendor_stand_ins import nvmath_stand_in

# as torch words them, from libtorch_python, libtorch_cuda, libtorch_cpu and its compiler
GPU_WARNINGS = {
    "sync debug mode": "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
    "operations (Triggered internally at /pytorch/torch/csrc/cuda/Module.cpp:915.)",
    "context": "Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set the primary "
    "context... (Triggered internally at /pytorch/aten/src/ATen/cuda/CublasHandlePool.cpp:330.)",
    "streams": "The AccumulateGrad node's stream does not match the stream of the node that produced the incoming "
    "gradient. This may incur unnecessary synchronization and break CUDA graph capture if ...",
    "TF32": "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. Consider setting "
    "`torch.set_float32_matmul_precision('high')` for better performance.",
}


@pytest.mark.parametrize("name", GPU_WARNINGS)
def test_what_only_a_gpu_warns_of_is_no_error(name: str) -> None:
    warnings.warn(GPU_WARNINGS[name], stacklevel=1)


def test_other_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="The CUDA Graph is empty"):
        warnings.warn("The CUDA Graph is empty.", stacklevel=1)


class TensorFloat32(TorchDispatchMode):
    """Convolutions as cuDNN computes them by default: float32 operands with ten bits of mantissa."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            args = [rounded(value) if isinstance(value, Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))


def rounded(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    return (tensor.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


def convolved(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)).to(dtype)
    st.sparsify_(model, "all-conv", verbose=False)
    x = torch.randn(3, 8, 7, 9, dtype=dtype, requires_grad=True)
    output = model(x)
    output.backward(torch.randn_like(output))
    return [output.detach(), *(tensor.grad for tensor in (x, *model.parameters()) if tensor.grad is not None)]


def test_a_comparison_with_a_gpu_bears_tf32_and_finds_what_is_wrong() -> None:
    expected, in_float32 = convolved(torch.float64), convolved(torch.float32)
    with TensorFloat32():
        assert_same_gradients(convolved(torch.float64), expected)
        # the fault that this is about: TF32 is outside of any tolerance that float32 deserves
        assert max(float((a - b).abs().max()) for a, b in zip(convolved(torch.float32), in_float32, strict=True)) > 1e-3
    with pytest.raises(AssertionError, match="may be multiplied in TF32"):
        assert_same_gradients(in_float32, in_float32)
    for place in range(len(expected)):
        wrong = [tensor.clone() for tensor in expected]
        wrong[place].view(-1)[3] *= 1 + 1e-5
        with pytest.raises(AssertionError, match="not close"):
            assert_same_gradients(wrong, expected)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_padding_is_not_compared_and_everything_else_is(bits: int) -> None:
    rows, columns = 4, 16
    count = rows * columns // 4 * 4 // bits  # units of metadata
    order = torch.randperm(count).tolist()
    source = torch.tensor([*order[:3], -1, *order[3:], *[-1] * (16 // bits * 3 - 1)], dtype=torch.int32)
    padding = torch.zeros(int((source < 0).sum()), dtype=torch.int16 if bits == 16 else torch.uint8)
    table = LearnedLayout(rows, columns, bits, source, padding)
    kept, words = rows * columns // 2, source.numel() * bits // 16
    ours = torch.randint(-(2**15), 2**15, (kept + words,), dtype=torch.int16)
    seen = set()
    for place in range(kept + words):
        for unit in range(16 // bits):
            theirs = ours.clone()
            theirs[place] ^= 1 << bits * unit if bits * unit < 15 else -(2**15)
            longer = torch.cat([theirs, torch.full((5,), 77, dtype=torch.int16)])
            number = (place - kept) * 16 // bits + unit
            different = places_that_differ(ours.view(torch.half), longer.view(torch.half), (rows, columns), table)
            assert different == int(place < kept or int(source[number]) >= 0), (place, unit)
            seen.add(different)
    assert seen == {0, 1}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[object]:
    yield from nvmath_stand_in(monkeypatch, tmp_path)


@pytest.mark.parametrize("planted", [False, True])
def test_a_copy_of_the_activations_is_noticed(stand_in: object, planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BACKENDS["cusparselt"]
    product = backend.product

    def copying(operand: Any, rows: Tensor, *rest: Any, **options: Any) -> Tensor:
        return product(operand, rows.clone(), *rest, **options)

    if planted:
        monkeypatch.setattr(backend, "product", copying)
    model = nn.Sequential(nn.Linear(96, 64)).bfloat16()
    st.sparsify_(model, backend="cusparselt", verbose=False)
    x = torch.randn(4096, 96, dtype=torch.bfloat16, requires_grad=True)
    outputs: list[Tensor] = []
    multiply: Callable[[], None] = lambda: outputs.append(model(x))  # noqa: E731
    multiply()  # packs the weight
    most = peak_bytes(multiply, torch.device("cpu"))
    assert outputs[1].numel() * 2 <= most
    assert (most > most_bytes(outputs[1], x, 1 << 16)) is planted


def test_an_input_whose_copy_would_pass_for_workspace_is_refused() -> None:
    small = torch.empty(8192, 768, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="input takes 12582912 bytes: a copy of it shows beside 67108864 only if"):
        most_bytes(small, small)
