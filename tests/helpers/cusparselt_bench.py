"""cuSPARSELt's wrapper on the stand-in, with matrices for it; a module that imports this is skipped without nvmath."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("nvmath.bindings.cusparseLt", reason="the stand-in takes its signatures from nvmath")
from fake_cusparselt import FakeCuSparseLt, FakeDevices

from sparsetrain.backends.cusparselt import CuSparseLt, Library

R, C, N = 32, 48, 24


class Bench:
    """The code under test on the stand-in; ``close`` must leave nothing alive."""

    def __init__(self, capacity: int = 16, workspace: int = 1024) -> None:
        self.devices = FakeDevices()
        self.fake = FakeCuSparseLt(self.devices, workspace)
        self.lt = CuSparseLt(Library(self.fake), self.devices, capacity)


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


def expected(a: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    result = a.double() @ dense.double()
    if bias is not None:
        result += bias.double()[:, None]
    return result


def assert_close(result: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(result.double(), wanted, rtol=2 * torch.finfo(result.dtype).eps, atol=1e-5)
