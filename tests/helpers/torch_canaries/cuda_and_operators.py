"""Canaries: CUDA, and operators of torch's own."""

import torch

from .registry import canary

OPERATORS = {
    "_cslt_compress": ["(Tensor input) -> Tensor"],
    "_cslt_sparse_mm": [
        "(Tensor compressed_A, Tensor dense_B, Tensor? bias=None,",
        "bool transpose_result=False, int alg_id=0,",
        ") -> Tensor",
    ],
    "_sparse_semi_structured_mm": ["(Tensor mat1, Tensor mat1_meta, Tensor mat2, *,", ") -> Tensor"],
    "_sparse_semi_structured_tile": ["(Tensor input, str algorithm=", "bool use_cutlass=True) -> (Tensor, Tensor,"],
}
"""Parts of their schemas; what they compute is tried on a GPU, by the tests of the backends."""


@canary(
    "_cuda_getCurrentRawStream",
    "torch._C._cuda_getCurrentRawStream(index) is the handle of a device's current stream, in builds for CUDA",
    "torch/csrc/cuda/Module.cpp; triton's driver asks it too",
    "launches of cuSPARSELt, which would ask in the public way and take several microseconds longer",
)
def _() -> None:
    assert hasattr(torch._C, "_cuda_getCurrentRawStream") == torch.backends.cuda.is_built()
    if torch.cuda.is_available():
        with torch.cuda.stream(torch.cuda.Stream()):
            index = torch.cuda.current_device()
            assert torch._C._cuda_getCurrentRawStream(index) == torch.cuda.current_stream().cuda_stream


@canary(
    "_sleep",
    "torch.cuda._sleep(cycles) keeps a stream busy for a time that grows with the cycles",
    "torch/cuda/__init__.py, _sleep",
    "benchmarks of kernels, whose times would hold those of the host",
)
def _() -> None:
    assert callable(torch.cuda._sleep)
    if torch.cuda.is_available():
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        for event, cycles in zip(events, (10**5, 10**8, 0), strict=True):
            event.record()
            torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        assert events[0].elapsed_time(events[1]) < events[1].elapsed_time(events[2])


def check_operator(name: str) -> None:
    schema = str(getattr(torch.ops.aten, name).default._schema)
    assert all(part in schema for part in OPERATORS[name]), schema


for each in OPERATORS:
    canary(
        each,
        f"torch.ops.aten.{each} takes {' … '.join(OPERATORS[each])}",
        "aten/src/ATen/native/native_functions.yaml and torch/sparse/semi_structured.py, which calls it",
        "the backends cutlass and cusparselt (without nvmath), or the benchmarks of their operators",
    )(lambda name=each: check_operator(name))


@canary(
    "_scaled_mm",
    "torch._scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum) multiplies 8-bit matrices and their scales",
    "aten/src/ATen/native/native_functions.yaml; torch.nn.functional.scaled_mm is to follow it",
    "the benchmark of 8-bit products",
)
def _() -> None:
    one, scales = torch.eye(16).to(torch.float8_e4m3fn), [torch.tensor(2.0), torch.tensor(3.0)]
    result = torch._scaled_mm(one, one.t(), *scales, out_dtype=torch.float32, use_fast_accum=False)
    assert torch.equal(result, 6 * torch.eye(16))


@canary(
    "_backend_fns",
    "an operator of torch.library.custom_op looks up its kernels by device in _backend_fns in every call",
    "torch/_library/custom_ops.py, CustomOpDef.register_kernel",
    "the benchmark of host time, whose stand-ins exchange kernels",
)
def _() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    operator = torch.library.custom_op("canaries::double", double, mutates_args=(), schema="(Tensor x) -> Tensor")
    operator.register_kernel("cuda")(double)
    assert {*operator._backend_fns} == {None, "cuda"}
    operator._backend_fns[None] = lambda x: 3 * x
    assert operator(torch.ones(())) == 3
