"""The backend ``tilelang``: with a stand-in for its compiler, and, where TileLang is installed, its CUDA source."""

import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsetrain as st
from sparsetrain.backends import Backend
from sparsetrain.backends.experimental.tilelang import (
    KernelKey,
    Tile,
    TilelangBackend,
    compile_kernel,
    cuda_source,
    tiles_for,
)
from sparsetrain.backends.experimental.tilelang import backend as backend_module
from sparsetrain.backends.experimental.tilelang import kernel as kernel_module
from sparsetrain.backends.packing import PackJob, fill_
from sparsetrain.hardware.machine import Machine
from sparsetrain.kernels.pack.reference import unpack_rows

CPU = torch.device("cpu")
HALVES = [torch.float16, torch.bfloat16]
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x, "relu2": lambda x: x.clamp(min=0) ** 2, "gelu": F.gelu,
}  # fmt: skip
H200 = Machine(gpu="NVIDIA H200", capability=(9, 0), torch="2.13.0+cu130", tilelang="0.1.15")
installed = pytest.mark.skipif(importlib.util.find_spec("tilelang") is None, reason="needs tilelang")


class Compiler:
    """Counts kernels; they are as strict as TileLang's, and multiply on a CPU."""

    def __init__(self) -> None:
        self.keys: list[KernelKey] = []
        self.launches = 0

    def __call__(self, key: KernelKey) -> Callable[..., None]:
        self.keys.append(key)

        def kernel(values: Tensor, meta: Tensor, rows: Tensor, *rest: Tensor) -> None:
            self.launches += 1
            *biases, result = rest
            assert len(biases) == key.bias
            assert values.shape == (key.rows, key.columns // 2)
            assert (meta.shape, meta.dtype) == ((key.rows, key.columns // 16), torch.int16)
            assert rows.shape[0] > 0
            assert rows.shape[1] == key.columns
            for tensor in (values, meta, rows, *rest):
                assert tensor.is_contiguous()
                assert tensor.data_ptr() % 16 == 0
                assert not tensor.requires_grad
                assert tensor is meta or str(tensor.dtype) == f"torch.{key.dtype}"
            sums = rows.double() @ unpack_rows(values, meta).double().t()
            result.copy_(ACTIVATIONS[key.epilogue](sums + sum(bias.double() for bias in biases)))

        return kernel


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def backend(compiler: Compiler) -> TilelangBackend:
    return TilelangBackend(compiler, lambda device: (9, 0), lambda device: 114)


def packed(backend: Backend, shape: tuple[int, int], dtype: torch.dtype):
    weight = torch.randn(shape)
    codes = st.transposable_codes(weight.abs())
    operand = backend.allocate(shape, dtype, CPU)
    fill_([PackJob(weight, codes, backend, dtype, operand)])
    return operand, (weight * st.decode_tiles(codes)).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("epilogue", [None, "relu2", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_equal_the_dense_ones(backend, dtype, bias, epilogue, transposed) -> None:
    operand, dense = packed(backend, (128, 256), dtype)
    added = torch.randn(128, dtype=dtype, requires_grad=True) if bias else None
    for tokens in (0, 1, 63, 130):
        rows = torch.randn(tokens, 256, dtype=dtype, requires_grad=True)
        found = backend.product(operand, rows, added, "", transposed, epilogue)
        exact = F.linear(rows.double(), dense.double(), None if added is None else added.double())
        expected = ACTIVATIONS[epilogue](exact).to(dtype)
        assert found.is_contiguous()
        assert torch.equal(found, expected.t() if transposed else expected)


def test_the_packer_writes_what_kernels_read(backend) -> None:
    operand, dense = packed(backend, (128, 128), torch.bfloat16)
    assert operand.tensors[0] is operand.values
    assert operand.tensors[1] is operand.meta
    assert operand.bytes == 128 * 128 * 9 // 8
    assert torch.equal(unpack_rows(*operand.tensors), dense)
    assert not backend.symmetric


def test_rows_of_any_strides_and_alignment_are_read(backend) -> None:
    operand, dense = packed(backend, (128, 128), torch.float16)
    whole = torch.randn(300, 400, dtype=torch.float16)
    bias = torch.randn(257, dtype=torch.float16)[1:257:2]
    flat = torch.randn(1 + 4 * 128, dtype=torch.float16)[1:].view(4, 128)
    for rows in (whole[:16, :128], whole[:9, 3:131], whole.t()[:128, :24].t(), whole[::2, :128], flat,
                 whole[:1, :128].expand(24, 128)):  # fmt: skip
        expected = F.linear(rows.double(), dense.double(), bias.double()).half()
        assert torch.equal(backend.product(operand, rows, bias), expected)


def test_a_kernel_is_compiled_once_for_all_numbers_of_tokens(backend, compiler) -> None:
    operand, _ = packed(backend, (256, 128), torch.bfloat16)
    other, _ = packed(backend, (256, 128), torch.bfloat16)
    for tokens in (256, 300, 9000):
        for given in (operand, other):
            backend.product(given, torch.zeros(tokens, 128, dtype=torch.bfloat16))
    assert compiler.launches == 6
    assert compiler.keys == [KernelKey(256, 128, "bfloat16", Tile(128, 256, 64), (9, 0), multiprocessors=114)]
    rows = torch.zeros(300, 128, dtype=torch.bfloat16)
    backend.product(operand, rows, torch.zeros(256, dtype=torch.bfloat16))
    backend.product(operand, rows, epilogue="relu2")
    backend.product(operand, rows, algorithm="256x128x64")
    assert [(key.bias, key.epilogue, str(key.tile)) for key in compiler.keys[1:]] == [
        (True, None, "128x256x64"), (False, "relu2", "128x256x64"), (False, None, "256x128x64"),
    ]  # fmt: skip


def test_every_algorithm_that_is_offered_is_run_for_any_number_of_tokens(compiler) -> None:
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        backend = TilelangBackend(compiler, lambda device, capability=capability: capability, lambda device: 84)
        for shape in ((128, 128), (256, 128)):
            operand = backend.allocate(shape, torch.float16, CPU)
            for tokens in (1, 64, 128, 4096):
                names = backend.algorithms(shape, tokens, torch.float16, CPU)
                assert names
                assert len(set(names)) == len(names)
                for name in names:
                    backend.product(operand, torch.zeros(3, 128, dtype=torch.float16), None, name)
                    assert str(compiler.keys[-1].tile) in names


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_tiles_fit_the_gpu_and_the_matrix(capability) -> None:
    limit = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}[capability] * 1024
    for rows in (128, 256, 384, 4096):
        for tile in tiles_for(rows, 8192, capability, 99):
            high, wide, deep = map(int, str(tile).split("x"))
            values, meta, tokens = high * deep // 2 * 2, high * deep // 16 * 2, wide * deep * 2
            stages, output = tile.stages(capability), wide * high * 2
            assert 3 <= stages <= 4
            # on 9.0 the output is written while the next tile is loaded
            least = (
                stages * (values + meta + tokens) + output
                if capability[0] == 9
                else max(stages * (values + tokens), output)
            )
            assert least <= tile.shared_bytes(stages, capability) <= limit - 1024
            assert deep in (64, 128)
            assert rows % high == 0
            assert wide % 16 == 0


def test_wrong_arguments_are_refused_before_anything_is_compiled(backend, compiler) -> None:
    operand, _ = packed(backend, (128, 128), torch.float16)
    rows = torch.zeros(8, 128, dtype=torch.float16)
    with pytest.raises(ValueError, match="algorithm is '256x128x128': for 128x128 it must be one of 128x256x64, "):
        backend.product(operand, rows, algorithm="256x128x128")
    with pytest.raises(ValueError, match="epilogue is 'tanh': it must be None or one of relu2, gelu"):
        backend.product(operand, rows, epilogue="tanh")
    with pytest.raises(ValueError, match="device is cpu: tilelang needs a CUDA GPU"):
        TilelangBackend(compiler).product(operand, rows)
    assert not compiler.keys


def test_without_a_gpu_it_says_so_in_one_sentence() -> None:
    reason = TilelangBackend().why_not(CPU, torch.bfloat16, (128, 128))
    assert reason is not None
    assert "GPU" in reason
    assert reason.count(". ") == 0


@pytest.mark.parametrize(
    ("machine", "dtype", "shape", "word"),
    [
        (Machine(gpu="NVIDIA B200", capability=(10, 0), torch="2.13.0"), torch.bfloat16, (128, 128), "10.0"),
        (Machine(gpu="NVIDIA H200", capability=(9, 0), torch="2.13.0"), torch.bfloat16, (128, 128), "not installed"),
        (H200, torch.float32, (128, 128), "float32"),
        (H200, torch.bfloat16, (128, 192), "128x256"),
    ],
)
def test_what_cannot_run_is_refused_without_importing_tilelang(monkeypatch, machine, dtype, shape, word) -> None:
    monkeypatch.setattr(backend_module, "machine_from_torch", lambda device: machine)
    monkeypatch.setattr(kernel_module, "load", lambda *_: pytest.fail("imported"))
    reason = TilelangBackend().why_not(torch.device("cuda"), dtype, shape)
    assert reason is not None
    assert word in reason


def usable_modules(arguments: str, cuda: bool) -> Callable[..., object]:
    scope: dict[str, Callable[..., None]] = {}
    exec(f"def gemm_sp({arguments}): pass", scope)

    def find_cuda_path() -> str:
        if not cuda:
            raise RuntimeError("Failed to detect CUDA.\nmore")
        return "/cuda"

    language = SimpleNamespace(gemm_sp=scope["gemm_sp"])
    modules = {
        "tilelang": SimpleNamespace(language=language, __version__="0.1.6"),
        "tilelang.contrib.nvcc": SimpleNamespace(find_cuda_path=find_cuda_path),
    }
    return lambda name="tilelang": modules[name]


def test_an_installed_package_is_tried_once(monkeypatch) -> None:
    monkeypatch.setattr(backend_module, "machine_from_torch", lambda device: H200)

    def reason() -> str | None:
        backend = TilelangBackend()
        return [backend.why_not(torch.device("cuda"), torch.bfloat16, (128, 128)) for _ in range(2)][1]

    calls = []

    def broken(*names: str) -> object:
        calls.append(names)
        raise OSError("libtvm.so: cannot open shared object file\nmore")

    monkeypatch.setattr(kernel_module, "load", broken)
    assert reason() == (
        "tilelang cannot be imported (libtvm.so: cannot open shared object file): "
        "reinstall it or use another backend."
    )  # fmt: skip
    assert len(calls) == 1
    monkeypatch.setattr(kernel_module, "load", usable_modules("A, E, B, C, transpose_A, transpose_B", True))
    assert reason() == "tilelang is 0.1.6: its sparse product takes no natural metadata, install 0.1.15."
    monkeypatch.setattr(kernel_module, "load", usable_modules("A, E, B, C, transpose_A, transpose_E", False))
    assert reason() == "tilelang finds no nvcc, its compiler: install the CUDA toolkit or set CUDA_HOME."
    monkeypatch.setattr(kernel_module, "load", usable_modules("A, E, B, C, transpose_A, transpose_E", True))
    assert reason() is None


def test_a_missing_package_is_answered_by_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tilelang", None)
    key = KernelKey(128, 128, "bfloat16", Tile(128, 128), (9, 0))
    for function in (compile_kernel, cuda_source):
        with pytest.raises(ImportError, match=r'the backend tilelang needs tilelang: pip install "sparsetrain\[til'):
            function(key)


def test_a_kernel_that_does_not_compile_gives_a_sentence(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("nvcc: command not found.\nmore")

    monkeypatch.setattr(kernel_module, "_program", lambda *_: None)
    monkeypatch.setattr(kernel_module, "load", lambda *_: SimpleNamespace(compile=fail))
    with pytest.raises(RuntimeError, match=r"tile is 128x64x128: .* for sm_90a \(nvcc: command not found\), use an"):
        compile_kernel(KernelKey(128, 128, "bfloat16", Tile(128, 64), (9, 0)))


@installed
@pytest.mark.parametrize(
    ("capability", "dtype", "instruction"),
    [
        ((8, 0), "bfloat16", "mma_sp_sync"), ((8, 9), "float16", "mma_sp_sync"), ((9, 0), "bfloat16", "wgmma_sp_ss"),
        ((9, 0), "float16", "wgmma_sp_ss"),
    ],
)  # fmt: skip
def test_the_source_multiplies_on_sparse_tensor_cores(capability, dtype, instruction) -> None:
    default, *others = tiles_for(256, 8192, capability)
    variants = [(default, True, "gelu"), (default, False, None), *((tile, True, "relu2") for tile in others)]
    for tile, bias, epilogue in variants:
        source = cuda_source(KernelKey(256, 384, dtype, tile, capability, bias, epilogue))
        assert f"tl::{instruction}<" in source
        assert ("bias" in source) == bias
        assert ("erf" in source) == (epilogue == "gelu")
        assert "int tokens" in source
        if capability == (9, 0):  # all in bulk, metadata too
            assert source.count("tl::tma_load(") == 3
            assert "tl::tma_store(" in source
