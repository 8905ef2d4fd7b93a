"""Compiling the TileLang program of a sparse product: ``Y = X·Aᵀ``, a bias and an activation, A in natural order.

Sparse tensor cores take the sparse matrix as their first operand, so a block computes ``Yᵀ = A·Xᵀ`` and turns its tile
in shared memory; Y is written in whole rows. The number of tokens is dynamic: one kernel serves them all.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

from ....hardware.extras import require
from . import ampere, hopper
from .tiles import KernelKey

Kernel: TypeAlias = Callable[..., object]
"""Takes values, meta, rows, the bias if there is one, and the output ``[T, R]``, which it fills."""


def load(module: str = "tilelang") -> ModuleType:
    """Import TileLang or a module of it.

    Raises:
        ImportError: If it is not installed.
    """
    return require(module, "tilelang", "the backend tilelang")


def why_not_usable() -> str | None:
    """Say in one sentence why an installed TileLang cannot be used, or return None; slow, because it imports it."""
    try:
        tilelang = load()
        if "transpose_E" not in inspect.signature(tilelang.language.gemm_sp).parameters:
            return f"tilelang is {tilelang.__version__}: its sparse product takes no natural metadata, install 0.1.15."
        nvcc = load("tilelang.contrib.nvcc")
    except Exception as error:
        return f"tilelang cannot be imported ({_first_line(error)}): reinstall it or use another backend."
    try:
        nvcc.find_cuda_path()
    except Exception:
        return "tilelang finds no nvcc, its compiler: install the CUDA toolkit or set CUDA_HOME."
    return None


def compile_kernel(key: KernelKey) -> Kernel:
    """Compile a kernel; takes seconds, and TileLang keeps the result on disk.

    Raises:
        ImportError: If TileLang is not installed.
        RuntimeError: If it fails.
    """
    tilelang = load()
    try:
        kernel: Kernel = tilelang.compile(_program(tilelang, key), target=key.target)
    except Exception as error:
        raise RuntimeError(
            f"tile is {key.tile}: TileLang does not compile it for {key.target['arch']} "
            f"({_first_line(error)}), use another algorithm or backend."
        ) from error
    return kernel


def lowered(key: KernelKey) -> Any:
    """Return a kernel as TileLang compiles it, up to its CUDA source; needs neither a GPU nor nvcc.

    Raises:
        ImportError: If TileLang is not installed.
    """
    tilelang, lower = load(), load("tilelang.engine.lower").lower
    target = tilelang.tvm.target.Target(key.target)
    with tilelang.tvm.transform.PassContext(opt_level=3), target:
        return lower(_program(tilelang, key), target=target)


def cuda_source(key: KernelKey) -> str:
    """Return the CUDA source of a kernel; needs neither a GPU nor nvcc.

    Raises:
        ImportError: If TileLang is not installed.
    """
    return str(lowered(key).kernel_source)


def _program(tilelang: Any, key: KernelKey) -> Any:
    # TileLang parses the functions of both programs: their names and literals are its language, and annotations are set
    # by hand, because no type checker reads shapes
    tl: Any = tilelang.language
    rows, columns, dtype = key.rows, key.columns, key.dtype
    tokens = tl.dynamic("tokens")
    blocks: Any = tl.macro((hopper if key.capability[0] == 9 else ampere).blocks(tilelang, key))

    def with_bias(values, meta, x, bias, y):  # type: ignore[no-untyped-def]
        blocks(values, meta, x, bias, y)

    def without_bias(values, meta, x, y):  # type: ignore[no-untyped-def]
        blocks(values, meta, x, None, y)

    main = with_bias if key.bias else without_bias
    main.__annotations__ = {
        "values": tl.Tensor((rows, columns // 2), dtype),
        "meta": tl.Tensor((rows, columns // 16), "int16"),
        "x": tl.Tensor((tokens, columns), dtype),
        "bias": tl.Tensor((rows,), dtype),
        "y": tl.Tensor((tokens, rows), dtype),
    }
    main.__name__ = "sparse_product"
    with tilelang.tvm.target.Target(key.target):
        return tl.prim_func(main)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")[:200]
