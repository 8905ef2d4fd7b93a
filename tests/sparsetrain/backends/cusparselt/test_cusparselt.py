import ast
import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")

import nvmath
import nvmath.bindings.cusparse as cusparse
import nvmath.bindings.cusparseLt as real  # noqa: N813
from fake_cusparselt import C_TYPES, PADDING, FakeCuSparseLt, FakeDevices, FakeError, check_arguments

from sparsetrain.backends.cusparselt import Algorithm, CuSparseLt, Library, library
from sparsetrain.backends.cusparselt.session_pool import default

R, C, N = 32, 48, 24
DTYPES = [torch.float16, torch.bfloat16]
PLAN_CALLS = ["matmul_descriptor_init", "matmul_alg_selection_init", "matmul_plan_init", "init"]


class Bench:
    """The code under test on the stand-in; ``close`` must leave nothing alive."""

    def __init__(self, capacity: int = 16, workspace: int = 1024) -> None:
        self.devices = FakeDevices()
        self.fake = FakeCuSparseLt(self.devices, workspace)
        self.lt = CuSparseLt(Library(self.fake), self.devices, capacity)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.lt.close()
    bench.fake.assert_clean()


def sparse(rows: int = R, columns: int = C, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    """A matrix with at most two values in four, some quads with fewer."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2
    keep[::5, 0] = False
    return (torch.randn(rows, columns, generator=generator) * keep.view(rows, columns)).to(dtype)


def normal(*size: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_columns(matrix: Tensor, leading: int) -> Tensor:
    """The same numbers with contiguous columns, ``leading`` apart, and NaN between them."""
    storage = torch.full((matrix.shape[1], leading), torch.nan, dtype=matrix.dtype)
    storage[:, : matrix.shape[0]] = matrix.t()
    return storage[:, : matrix.shape[0]].t()


def expected(a: Tensor, dense: Tensor, bias: Tensor | None, epilogue: str | None) -> Tensor:
    result = a.double() @ dense.double()
    if bias is not None:
        result += bias.double()[:, None]
    return {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}[epilogue](result)


def assert_close(result: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(result.double(), wanted, rtol=2 * torch.finfo(result.dtype).eps, atol=1e-5)


# numbers


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["columns", "rows"])
@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("epilogue", [None, "relu", "gelu"])
def test_the_product_equals_a_dense_one(
    bench: Bench, dtype: torch.dtype, output: Any, order: str, n: int, with_bias: bool, epilogue: Any
) -> None:
    a, dense = sparse(dtype=dtype), normal(C, n, dtype=dtype)
    operand = in_columns(dense, C + 8) if order == "columns" else in_columns(dense.t(), n + 16).t()
    bias = normal(R, dtype=dtype, seed=2) if with_bias else None
    result = bench.lt.multiply(bench.lt.compress(a), (R, C), operand, bias=bias, epilogue=epilogue, output=output)
    assert result.dtype == dtype
    assert result.shape == (R, n)
    assert result.stride() == ((1, R) if output == "columns" else (n, 1))
    assert_close(result, expected(a, dense, bias, epilogue))


def test_rows_through_a_layer_and_the_transposed_result(bench: Bench) -> None:
    a, x, bias = sparse(), normal(N, C), normal(R, seed=2)
    compressed = bench.lt.compress(a)
    y = bench.lt.multiply(compressed, (R, C), x.t(), bias=bias).t()
    transposed = bench.lt.multiply(compressed, (R, C), x.t(), bias=bias, output="rows")
    assert y.is_contiguous()
    assert transposed.is_contiguous()
    assert_close(y, F.linear(x.double(), a.double(), bias.double()))
    assert torch.equal(transposed, y.t())


def test_the_product_of_a_weight_gradient(bench: Bench) -> None:
    output_gradient, x = sparse(R, 64), normal(64, 24)
    result = bench.lt.multiply(bench.lt.compress(output_gradient), (R, 64), x, output="rows")
    assert result.is_contiguous()
    assert_close(result, output_gradient.double() @ x.double())


def test_a_matrix_with_distant_rows_is_compressed_like_its_copy(bench: Bench) -> None:
    a = sparse()
    distant = F.pad(a, (0, 16))[:, :C]
    assert not distant.is_contiguous()
    compressed = bench.lt.compress(distant)
    assert torch.equal(compressed, bench.lt.compress(a))
    assert compressed.shape == (bench.lt.compressed_size(R, C, a.dtype),)
    assert compressed.numel() == -(-(R * C * 5 // 4 + PADDING) // 2)
    assert compressed.view(torch.uint8)[-PADDING:].eq(0).all()


def test_compressing_into_a_buffer_keeps_its_address(bench: Bench) -> None:
    first, second, x = sparse(), sparse(seed=5), normal(C, N)
    compressed = bench.lt.compress(first)
    address = compressed.data_ptr()
    assert bench.lt.compress(second, out=compressed).data_ptr() == address
    assert_close(bench.lt.multiply(compressed, (R, C), x), second.double() @ x.double())


# plans


def test_a_second_call_makes_one_library_call(bench: Bench) -> None:
    compressed, dense, bias = bench.lt.compress(sparse()), normal(C, N), normal(R)
    bench.lt.multiply(compressed, (R, C), dense, bias=bias)
    before = bench.fake.calls.copy()
    other = normal(C, N, seed=9)
    bench.lt.multiply(compressed, (R, C), other, bias=bias)
    assert bench.fake.calls - before == {"matmul": 1}
    before = bench.fake.calls.copy()
    bench.lt.compress(sparse())
    assert bench.fake.calls - before == {"sp_mma_compress2": 1}


@pytest.mark.parametrize("change", ["n", "order", "leading", "epilogue", "bias", "moved bias", "output", "algorithm"])
def test_what_a_plan_depends_on_gets_another_plan(bench: Bench, change: str) -> None:
    a, bias, moved = sparse(), normal(R), normal(R, seed=7)
    compressed, dense = bench.lt.compress(a), normal(C, N)
    bench.lt.multiply(compressed, (R, C), dense, bias=bias)
    arguments: dict[str, Any] = {"dense": dense, "bias": bias}
    arguments |= {  # type: ignore[call-overload]
        "n": {"dense": normal(C, N + 8)},
        "order": {"dense": in_columns(dense, C)},
        "leading": {"dense": normal(C, N + 8)[:, :N]},
        "epilogue": {"epilogue": "relu"},
        "bias": {"bias": None},
        "moved bias": {"bias": moved},
        "output": {"output": "rows"},
        "algorithm": {"algorithm": Algorithm(3)},
    }[change]
    for _ in range(2):
        result = bench.lt.multiply(compressed, (R, C), **arguments)
        assert_close(result, expected(a, arguments["dense"], arguments["bias"], arguments.get("epilogue")))
    assert bench.fake.calls["matmul_plan_init"] == 2


def test_the_plans_used_last_stay_and_the_others_are_destroyed_in_order() -> None:
    bench = Bench(capacity=2)
    compressed = bench.lt.compress(sparse())
    narrow, middle, wide = (normal(C, n) for n in (8, 16, 24))
    for dense in (narrow, middle, narrow, wide):  # middle is the one used least lately
        bench.lt.multiply(compressed, (R, C), dense)
    assert bench.fake.destroyed == ["plan", "selection", "product", "matrix", "matrix", "matrix"]
    before = bench.fake.calls["matmul_plan_init"]
    bench.lt.multiply(compressed, (R, C), narrow)
    assert bench.fake.calls["matmul_plan_init"] == before
    bench.lt.multiply(compressed, (R, C), middle)
    assert bench.fake.calls["matmul_plan_init"] == before + 1
    bench.lt.close()
    bench.fake.assert_clean()
    assert bench.fake.destroyed[-1] == "handle"
    bench.lt.compress(sparse())  # starts again
    bench.lt.close()
    bench.fake.assert_clean()


def test_what_the_library_refuses_is_destroyed_and_named(bench: Bench) -> None:
    compressed = bench.lt.compress(sparse())
    alive = len(bench.fake.things)
    with pytest.raises(RuntimeError, match=r"refuses PlanKey\(rows=32.*config_id=99.*\): CONFIG_ID 99\."):
        bench.lt.multiply(compressed, (R, C), normal(C, N), algorithm=Algorithm(99))
    assert len(bench.fake.things) == alive
    with pytest.raises(RuntimeError, match="cannot compress a matrix: the matrix is not 2:4"):
        bench.lt.compress(torch.ones(R, C).half())


def test_algorithms_are_counted_for_a_key_and_set(bench: Bench) -> None:
    dense = normal(C, N)
    key = bench.lt.key((R, C), dense)
    assert (key.rows, key.columns, key.n) == (R, C, N)
    assert (key.dense_order, key.dense_leading, key.output_order, key.output_leading) == ("rows", N, "columns", R)
    assert not bench.fake.calls
    assert bench.lt.algorithm_count(key) == 8
    assert bench.lt.algorithm_count(replace(key, dense_order="columns", dense_leading=C)) == 7
    compressed = bench.lt.compress(sparse())
    for algorithm in (Algorithm(), Algorithm(7), Algorithm(0, 2, 1), Algorithm(None, -1)):
        bench.lt.multiply(compressed, (R, C), dense, algorithm=algorithm)
    got = [(launch.config_id, launch.split) for launch in bench.fake.launches]
    assert got == [(None, (1, 0)), (7, (1, 0)), (0, (2, 1)), (None, (-1, 0))]


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [(Algorithm(), ""), (Algorithm(0), "0"), (Algorithm(7, 2, 1), "7/2/1"), (Algorithm(None, 4), "/4/0")],
)
def test_an_algorithm_is_read_back(algorithm: Algorithm, text: str) -> None:
    assert str(algorithm) == text
    assert Algorithm.parse(text) == algorithm


@pytest.mark.parametrize("text", ["x", "1/2", "1/2/3/4", "1//"])
def test_nonsense_is_no_algorithm(text: str) -> None:
    with pytest.raises(ValueError, match=r"algorithm is .*: it must be"):
        Algorithm.parse(text)


# threads, devices, streams, workspaces


def in_a_thread(function: Any) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def test_two_threads_at_once_have_two_handles_and_an_ended_one_leaves_its_own(bench: Bench) -> None:
    compressed, dense = bench.lt.compress(sparse()), normal(C, N)

    def product() -> None:
        bench.lt.multiply(compressed, (R, C), dense)

    product()
    assert bench.fake.calls["init"] == 1
    in_a_thread(product)
    assert (bench.fake.calls["init"], bench.fake.calls["matmul_plan_init"]) == (2, 2)
    in_a_thread(product)
    assert (bench.fake.calls["init"], bench.fake.calls["matmul_plan_init"]) == (2, 2)
    assert len(bench.fake.launches) == 3


def test_every_device_has_a_handle_and_is_current_in_its_calls(bench: Bench) -> None:
    a, dense = sparse(), normal(C, N)
    for index in (0, 1, 0, 1):
        bench.devices.where = index  # the stand-in refuses a handle of another device
        assert_close(bench.lt.multiply(bench.lt.compress(a), (R, C), dense), a.double() @ dense.double())
    handles = [thing.values["device"] for thing in bench.fake.things.values() if thing.kind == "handle"]
    assert handles == [0, 1]
    assert bench.devices.now == 0


def test_work_goes_to_the_current_stream_with_its_own_workspace(bench: Bench) -> None:
    a, dense = sparse(), normal(C, N)
    for stream in (0, 0x7F0012345678, 0):
        bench.devices.streams[0] = stream
        bench.lt.multiply(bench.lt.compress(a), (R, C), dense)
    assert bench.fake.compress_streams == [0, 0x7F0012345678, 0]
    first, second, third = bench.fake.launches
    assert [first.stream, second.stream, third.stream] == [0, 0x7F0012345678, 0]
    assert first.workspace == third.workspace != second.workspace


def test_a_workspace_grows_and_is_reused(bench: Bench) -> None:
    compressed = bench.lt.compress(sparse())
    for n in (80, 8, 4096, 80):
        bench.lt.multiply(compressed, (R, C), normal(C, n))
    first, small, grown, again = (launch.workspace for launch in bench.fake.launches)
    assert first == small != grown == again


def test_threads_share_the_workspace_of_a_stream(bench: Bench) -> None:
    compressed, dense = bench.lt.compress(sparse()), normal(C, N)
    bench.lt.multiply(compressed, (R, C), dense)
    in_a_thread(lambda: bench.lt.multiply(compressed, (R, C), dense))
    first, second = bench.fake.launches
    assert first.workspace == second.workspace


def test_a_captured_product_takes_a_workspace_of_its_own(bench: Bench) -> None:
    compressed, dense = bench.lt.compress(sparse()), normal(C, N)
    bench.lt.multiply(compressed, (R, C), dense)
    bench.devices.capturing = True
    before = bench.fake.calls.copy()
    bench.lt.multiply(compressed, (R, C), dense)
    assert bench.fake.calls - before == {"matmul": 1}
    bench.devices.capturing = False
    bench.lt.multiply(compressed, (R, C), dense)
    first, captured, after = (launch.workspace for launch in bench.fake.launches)
    assert first == after != captured


def test_a_library_that_needs_no_workspace_gets_none() -> None:
    bench = Bench(workspace=0)
    a, dense = sparse(), normal(C, N)
    assert_close(bench.lt.multiply(bench.lt.compress(a), (R, C), dense), a.double() @ dense.double())
    assert bench.fake.launches[0].workspace == 0


# errors

HALF = torch.float16


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
        ({"epilogue": "tanh"}, r"epilogue is 'tanh': it must be None or one of \['gelu', 'relu'\]"),
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


# the real library's signatures


def test_every_binding_call_in_the_wrapper_exists_and_was_tried(bench: Bench) -> None:
    tree = ast.parse(Path(library.__file__).read_text())
    used = {
        node.func.attr: node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in ("self.binding", "binding")
    }
    assert "matmul" in used
    for name, node in used.items():
        assert len(node.args) == len(inspect.signature(getattr(real, name)).parameters) == len(C_TYPES[name]), name
    a, dense, bias = sparse(), normal(C, N), normal(R)
    compressed = bench.lt.compress(a)
    bench.lt.multiply(compressed, (R, C), dense, bias=bias, epilogue="relu", algorithm=Algorithm(1, 2, 1))
    bench.lt.algorithm_count(bench.lt.key((R, C), dense))
    assert bench.lt.version() == "0.8.1"
    bench.lt.close()
    assert set(bench.fake.calls) == set(used)


def test_numbers_of_enumerators_are_those_of_nvmath() -> None:
    types = {torch.float16: nvmath.CudaDataType.CUDA_R_16F, torch.bfloat16: nvmath.CudaDataType.CUDA_R_16BF}
    assert {dtype: kind.value for dtype, kind in types.items()} == library.DATA_TYPES
    assert {"columns": cusparse.Order.COL, "rows": cusparse.Order.ROW} == library.ORDERS
    assert cusparse.Operation.NON_TRANSPOSE == library._NON_TRANSPOSE
    names = [nvmath.LibraryPropertyType(part).name for part in library._VERSION_PARTS]
    assert names == ["MAJOR_VERSION", "MINOR_VERSION", "PATCH_LEVEL"]


def test_the_stand_in_notices_wrong_calls(bench: Bench) -> None:
    fake = bench.fake
    handle = fake.init()
    with pytest.raises(TypeError, match="missing a required argument"):
        fake.matmul(handle)
    with pytest.raises(OverflowError, match="does not fit into int"):
        check_arguments("mat_desc_set_attribute", (handle, 0, 2**40, 0, 0))
    with pytest.raises(TypeError, match="is no intptr_t"):
        fake.destroy(str(handle))
    matrix = fake.dense_descriptor_init(handle, 8, 8, 8, 16, 2, 1)
    with pytest.raises(FakeError, match="a handle is destroyed before"):
        fake.destroy(handle)
    with pytest.raises(AssertionError, match="leaked"):
        fake.assert_clean()
    fake.mat_descriptor_destroy(matrix)
    with pytest.raises(FakeError, match="does not live"):
        fake.mat_descriptor_destroy(matrix)
    fake.destroy(handle)
    with pytest.raises(FakeError, match="does not live"):
        fake.dense_descriptor_init(handle, 8, 8, 8, 16, 2, 1)
