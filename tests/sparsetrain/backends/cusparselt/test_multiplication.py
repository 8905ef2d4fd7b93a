"""What the wrapper of cuSPARSELt compresses and multiplies, against dense products."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cusparselt_bench import Bench, C, N, R, assert_close, expected, in_columns, normal, sparse
from fake_cusparselt import PADDING

DTYPES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("output", ["columns", "rows"])
@pytest.mark.parametrize("order", ["columns", "rows"])
@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_equals_a_dense_one(
    bench: Bench, dtype: torch.dtype, output: Any, order: str, n: int, with_bias: bool
) -> None:
    a, dense = sparse(dtype=dtype), normal(C, n, dtype=dtype)
    operand = in_columns(dense, C + 8) if order == "columns" else in_columns(dense.t(), n + 16).t()
    bias = normal(R, dtype=dtype, seed=2) if with_bias else None
    result = bench.lt.multiply(bench.lt.compress(a), (R, C), operand, bias=bias, output=output)
    assert result.dtype == dtype
    assert result.shape == (R, n)
    assert result.stride() == ((1, R) if output == "columns" else (n, 1))
    assert_close(result, expected(a, dense, bias))


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
