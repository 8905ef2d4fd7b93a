"""Two ways to cuSPARSELt: nvmath's bindings with plans of our own, or PyTorch's operators, which plan in every call."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.torch_internals import cslt_compress, cslt_sparse_mm
from .library import Order
from .plans import Algorithm, PlanKey
from .session_pool import CuSparseLt, default

TORCH_ALGORITHMS = 16
"""PyTorch does not tell how many there are; those that are not there raise, and are denied."""


class Provider(Protocol):
    """What the backend asks of cuSPARSELt."""

    name: str

    def why_not(self) -> str | None:
        """Say in one sentence why this way is closed, or return None."""

    def version(self) -> str:
        """Return the library's version."""

    def compress(self, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        """Compress a 2:4 matrix ``[R, C]`` into a buffer, an earlier one if given."""

    def multiply(
        self,
        compressed: Tensor,
        shape: tuple[int, int],
        rows: Tensor,
        bias: Tensor | None,
        algorithm: str,
        transposed_output: bool,
    ) -> Tensor:
        """Return ``rows [T, C]`` times the transpose of the compressed matrix; T a multiple of 8."""

    def algorithms(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> Sequence[str]:
        """Return names of algorithms, the default first."""


class NvmathProvider:
    """``nvmath.bindings.cusparseLt``: cached plans, every algorithm, outputs in both orders."""

    name = "nvmath"

    def __init__(self, library: CuSparseLt | None = None) -> None:
        self._library = default() if library is None else library

    def why_not(self) -> str | None:
        """Say in one sentence why this way is closed, or return None."""
        return self._reason

    @functools.cached_property
    def _reason(self) -> str | None:
        if importlib.util.find_spec("nvmath") is None:
            return 'nvmath is not installed: pip install "sparsetrain[cuda]".'
        try:
            if torch.cuda.is_available():
                _ = self._library.session(torch.cuda.current_device()).handle
        except Exception as error:  # the library, its driver or the binding: each fails in its own way
            return f"nvmath cannot start cuSPARSELt ({str(error).strip() or repr(error)}): reinstall nvmath-python."
        return None

    def version(self) -> str:
        """Return the library's version."""
        return self._library.version()

    def compress(self, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        """Compress a 2:4 matrix."""
        return self._library.compress(matrix, out)

    def multiply(
        self,
        compressed: Tensor,
        shape: tuple[int, int],
        rows: Tensor,
        bias: Tensor | None,
        algorithm: str,
        transposed_output: bool,
    ) -> Tensor:
        """Return the product; its transpose is never copied."""
        order: Order = "rows" if transposed_output else "columns"
        result = self._library.multiply(
            compressed, shape, rows.t(), bias=bias, output=order, algorithm=_algorithm(algorithm)
        )
        return result if transposed_output else result.t()

    def algorithms(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> Sequence[str]:
        """Return the library's own choice and every id."""
        rows, columns = shape
        key = PlanKey(rows, columns, tokens, dtype, "columns", columns, "columns", rows, 0, Algorithm())
        return "", *map(str, range(self._library.algorithm_count(key)))


class TorchProvider:
    """``torch.ops.aten._cslt_*``: where nvmath is missing."""

    name = "torch"

    def why_not(self) -> str | None:
        """Say in one sentence why this way is closed, or return None."""
        for name, operator in {"compress": cslt_compress, "sparse_mm": cslt_sparse_mm}.items():
            if operator is None:
                return f"torch {torch.__version__} has no operator aten::_cslt_{name}: install nvmath-python instead."
        if not torch.backends.cusparselt.is_available():
            return f"torch {torch.__version__} is built without cuSPARSELt: install nvmath-python instead."
        return None

    def version(self) -> str:
        """Return the library's version."""
        number = torch.backends.cusparselt.version() or 0
        return f"{number // 1000}.{number // 100 % 10}.{number % 100}"

    def compress(self, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        """Compress a 2:4 matrix."""
        result: Tensor = cslt_compress(matrix)
        return result if out is None else out.copy_(result.view(out.shape))

    def multiply(
        self,
        compressed: Tensor,
        shape: tuple[int, int],
        rows: Tensor,
        bias: Tensor | None,
        algorithm: str,
        transposed_output: bool,
    ) -> Tensor:
        """Return the product."""
        # the operator takes the rows of A from the buffer's shape, and any dense operand for a whole transpose
        result: Tensor = cslt_sparse_mm(
            compressed.view(shape[0], -1),
            rows.contiguous().t(),
            bias,
            transpose_result=not transposed_output,
            alg_id=int(algorithm or 0),
        )
        return result

    def algorithms(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> Sequence[str]:
        """Return the ids that may be there."""
        return tuple(map(str, range(TORCH_ALGORITHMS)))


_ALGORITHMS: dict[str, Algorithm] = {}


def _algorithm(name: str) -> Algorithm:
    known = _ALGORITHMS.get(name)
    if known is None:
        known = _ALGORITHMS[name] = Algorithm.parse(name)
    return known
