"""The bindings of cuSPARSELt, and the stand-in for them: they are called as nvmath declares them."""

import ast
import inspect
from pathlib import Path

import nvmath
import nvmath.bindings.cusparse as cusparse
import nvmath.bindings.cusparseLt as real  # noqa: N813
import pytest
import torch
from cusparselt_bench import Bench, C, N, R, normal, sparse
from fake_cusparselt import C_TYPES, FakeError, check_arguments

from sparsetrain.backends.cusparselt import Algorithm, library


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
    bench.lt.multiply(compressed, (R, C), dense, bias=bias, algorithm=Algorithm(1, 2, 1))
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
