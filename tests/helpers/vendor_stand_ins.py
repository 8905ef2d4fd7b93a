"""Backends of vendors as if there were a GPU: on the stand-in for nvmath, and on CPU implementations of operators.

The functions are generators for fixtures: they put the backends into ``BACKENDS`` and take everything away again.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cusparselt import FakeCuSparseLt, FakeDevices, compress, decompress
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass
from torch.utils._python_dispatch import _disable_current_modes

from sparsetrain.backends import BACKENDS, CuSparseLtBackend, CutlassBackend
from sparsetrain.backends.cusparselt import CuSparseLt, Library
from sparsetrain.backends.cusparselt import metadata_layout as layouts
from sparsetrain.backends.cusparselt.providers import NvmathProvider, TorchProvider

HALVES = [torch.float16, torch.bfloat16]


class OpenBackend(CuSparseLtBackend):
    """As if this machine had a GPU."""

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        return None if dtype in HALVES else f"dtype is {dtype}: it must be float16 or bfloat16."


class OpenCutlass(CutlassBackend):
    """As if this machine had a GPU."""

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        return None if dtype in HALVES else f"dtype is {dtype}: it must be float16 or bfloat16."


def unseen(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call whose own tensors no dispatch mode counts, as those of a library are not."""

    def wrapped(*arguments: Any) -> Any:
        with _disable_current_modes():
            return call(*arguments)

    return wrapped


def nvmath_stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeCuSparseLt]:
    """Let ``cusparselt`` be a backend on the stand-in for nvmath's bindings; nothing may be left alive in it."""
    devices = FakeDevices()
    fake = FakeCuSparseLt(devices)
    fake.matmul = unseen(fake.matmul)  # type: ignore[attr-defined]
    library = CuSparseLt(Library(fake), devices)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(folder))
    monkeypatch.setattr(layouts, "_decisions", {})
    monkeypatch.setitem(BACKENDS, "cusparselt", OpenBackend([NvmathProvider(library)]))
    yield fake
    library.close()
    fake.assert_clean()


def operator_stand_ins(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[dict[str, list[object]]]:
    """CPU implementations behind the schemas of PyTorch's operators, as strict as the real ones."""
    seen: dict[str, list[object]] = {"alg_id": [], "compress": []}

    def cslt_compress(input: Tensor) -> Tensor:
        seen["compress"].append(tuple(input.shape))
        assert input.is_contiguous()
        buffer = torch.full((input.shape[0], input.shape[1] * 5 // 8 + 2), torch.nan, dtype=input.dtype)
        compress(input, buffer.data_ptr())
        return buffer

    def cslt_sparse_mm(
        a: Tensor, b: Tensor, bias: Tensor | None = None, alpha: Any = None, out_dtype: Any = None,
        transpose_result: bool = False, alg_id: int = 0, split_k: int = 1, split_k_mode: int = -1,
    ) -> Tensor:  # fmt: skip
        assert a.dim() == 2
        assert alpha is None
        assert out_dtype is None
        assert b.is_contiguous() or b.t().is_contiguous()
        assert b.shape[1] % 8 == 0
        seen["alg_id"].append(alg_id)
        rows, columns = a.shape[0], b.shape[0]
        matrix = {"rows": rows, "cols": columns, "ld": columns, "dtype": b.dtype, "order": 2}
        result = F.linear(b.t().float(), decompress(a.data_ptr(), matrix).float())
        result = (result if bias is None else result + bias.float()).to(b.dtype)
        return result.contiguous() if transpose_result else result.t().contiguous()

    def structured_mm(mat1: Tensor, mat1_meta: Tensor, mat2: Tensor, *, out_dtype: Any = None) -> Tensor:
        assert mat1_meta.dim() == 2
        assert mat2.shape[1] % 8 == 0
        dense: Tensor = sparse_semi_structured_to_dense_cutlass(mat1, mat1_meta)  # type: ignore[no-untyped-call]
        return dense @ mat2

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("_cslt_compress", cslt_compress, "CPU")  # type: ignore[no-untyped-call]
    library.impl("_cslt_sparse_mm", cslt_sparse_mm, "CPU")  # type: ignore[no-untyped-call]
    library.impl("_sparse_semi_structured_mm", structured_mm, "CPU")  # type: ignore[no-untyped-call]
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(folder))
    monkeypatch.setattr(layouts, "_decisions", {})
    monkeypatch.setitem(BACKENDS, "cusparselt", OpenBackend([TorchProvider()]))
    monkeypatch.setitem(BACKENDS, "cutlass", OpenCutlass())
    yield seen
    library._destroy()  # type: ignore[no-untyped-call]
