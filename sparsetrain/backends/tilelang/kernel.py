"""The TileLang program of a sparse product: ``Y = X·Aᵀ``, a bias and an activation, with A in natural order.

Sparse tensor cores take the sparse matrix as their first operand, so a block computes ``Yᵀ = A·Xᵀ`` and turns its tile
in shared memory; Y is written in whole rows. The number of tokens is dynamic: one kernel serves them all.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias

from ...extras import require

Epilogue: TypeAlias = Literal["relu2", "gelu"]
"""What is applied after the bias, in float32: the squared ReLU, or the exact GELU."""

Kernel: TypeAlias = Callable[..., object]
"""Takes values, meta, rows, the bias if there is one, and the output ``[T, R]``, which it fills."""

EPILOGUES = ("relu2", "gelu")

MOST_STAGES = 4
"""Loads further ahead than that hide no more latency."""

FEW_TOKENS = 64
"""Tiles of so many tokens are offered for any number."""

_KIB = 1024
_SHARED_MEMORY = {(8, 0): 163 * _KIB, (8, 7): 163 * _KIB, (9, 0): 227 * _KIB}
_LEAST_SHARED_MEMORY = 99 * _KIB  # of a block on any other GPU of compute capability 8.x


@dataclass(frozen=True)
class Tile:
    """What a block computes at a time.

    Args:
        rows: Of A; columns of Y.
        tokens: Rows of Y.
        columns: Of A, in one stage; fewer than 128 would make rows of metadata too short to be copied in bulk.

    Example:
        >>> str(Tile(128, 256)), Tile(128, 256).threads, Tile(128, 256).stage_bytes
        ('128x256x128', 256, 83968)
    """

    rows: int
    tokens: int
    columns: int = 128

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}x{self.columns}"

    @property
    def threads(self) -> int:
        """Threads that multiply; on compute capability 9.0 there are 128 more that load."""
        return 128 if self.rows * self.tokens < 128 * 128 else 256

    @property
    def stage_bytes(self) -> int:
        """Shared memory for values, metadata and tokens of one stage."""
        return self.rows * self.columns + self.rows * self.columns // 8 + self.tokens * self.columns * 2

    def stages(self, capability: tuple[int, int]) -> int:
        """Return how many stages are loaded ahead of each other on a GPU; fewer than two do not fit."""
        room = _SHARED_MEMORY.get(capability, _LEAST_SHARED_MEMORY) - _KIB  # barriers and alignment
        return min(MOST_STAGES, room // self.stage_bytes)


TILES = (Tile(128, 256), Tile(256, 128), Tile(128, 128), Tile(128, 64), Tile(64, 128))
"""In the order in which they are taken without a measurement."""


def tiles_for(rows: int, tokens: int, capability: tuple[int, int], most: int = 4) -> tuple[Tile, ...]:
    """Return the tiles that a product with ``[R, C]`` can use, the default first.

    Args:
        rows: R, a multiple of 128.
        tokens: T.
        capability: Compute capability of the GPU.
        most: How many; each is compiled and measured once for a matrix.

    Example:
        >>> [str(tile) for tile in tiles_for(4096, 8192, (9, 0))]
        ['128x256x128', '256x128x128', '128x128x128', '128x64x128']
        >>> [str(tile) for tile in tiles_for(4096, 8192, (8, 9))]
        ['128x64x128', '64x128x128']
    """
    found = [
        tile for tile in TILES
        if rows % tile.rows == 0 and tile.tokens <= max(tokens, FEW_TOKENS) and tile.stages(capability) > 1
    ]  # fmt: skip
    return tuple(found[:most])


@dataclass(frozen=True)
class KernelKey:
    """What a compiled kernel depends on.

    Args:
        rows: R.
        columns: C.
        dtype: ``"bfloat16"`` or ``"float16"``.
        tile: What a block computes.
        capability: Compute capability of the GPU.
        bias: Whether a bias is added.
        epilogue: What follows.
    """

    rows: int
    columns: int
    dtype: str
    tile: Tile
    capability: tuple[int, int]
    bias: bool = False
    epilogue: Epilogue | None = None

    @property
    def target(self) -> dict[str, str]:
        """What TileLang compiles for."""
        major, minor = self.capability
        return {"kind": "cuda", "arch": f"sm_{major}{minor}" + ("a" if major == 9 else "")}


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


def cuda_source(key: KernelKey) -> str:
    """Return the CUDA source of a kernel; needs neither a GPU nor nvcc.

    Raises:
        ImportError: If TileLang is not installed.
    """
    tilelang, lower = load(), load("tilelang.engine.lower").lower
    target = tilelang.tvm.target.Target(key.target)
    with tilelang.tvm.transform.PassContext(opt_level=3), target:
        return str(lower(_program(tilelang, key), target=target).kernel_source)


def _program(tilelang: Any, key: KernelKey) -> Any:
    # TileLang parses the functions below: their names and literals are its language, and annotations are set by hand,
    # because no type checker reads shapes
    tl: Any = tilelang.language
    tile, dtype, epilogue = key.tile, key.dtype, key.epilogue
    high, wide, deep = tile.rows, tile.tokens, tile.columns
    stages, threads = tile.stages(key.capability), tile.threads
    columns, rows = key.columns, key.rows
    tokens = tl.dynamic("tokens")
    hopper = key.capability[0] == 9
    # warpgroups read operands from shared memory, wide ones least; warps keep them in registers, squares longest
    policy = tl.GemmWarpPolicy.FullRow if hopper else tl.GemmWarpPolicy.Square
    swizzled = tilelang.layout.make_swizzled_layout

    def product(values, meta, x, bias, y):  # type: ignore[no-untyped-def]
        with tl.Kernel(rows // high, tl.ceildiv(tokens, wide), threads=threads) as (row, token):
            value_tile = tl.alloc_shared((high, deep // 2), dtype)
            meta_tile = tl.alloc_shared((high, deep // 16), "int16")
            x_tile = tl.alloc_shared((wide, deep), dtype)
            y_tile = tl.alloc_shared((wide, high), dtype)
            sums = tl.alloc_fragment((high, wide), "float32")
            if not hopper:  # there, bulk copies choose the layout
                tl.annotate_layout({y_tile: swizzled(y_tile)})
            tl.use_swizzle(panel_size=8)
            tl.clear(sums)
            for step in tl.Pipelined(columns // deep, num_stages=stages):
                tl.copy(values[row * high, step * (deep // 2)], value_tile)
                tl.copy(meta[row * high, step * (deep // 16)], meta_tile)
                tl.copy(x[token * wide, step * deep], x_tile)
                tl.gemm_sp(value_tile, meta_tile, x_tile, sums, transpose_B=True, policy=policy)
            if bias is not None:
                for i, j in tl.Parallel(high, wide):
                    sums[i, j] = sums[i, j] + tl.cast(bias[row * high + i], "float32")
            if epilogue == "relu2":
                for i, j in tl.Parallel(high, wide):
                    # a NaN stays one, as in max it would not
                    sums[i, j] = tl.if_then_else(sums[i, j] < 0.0, 0.0, sums[i, j] * sums[i, j])
            if epilogue == "gelu":
                for i, j in tl.Parallel(high, wide):
                    sums[i, j] = 0.5 * sums[i, j] * (1.0 + tl.erf(sums[i, j] * 0.7071067811865476))
            for i, j in tl.Parallel(high, wide):
                y_tile[j, i] = tl.cast(sums[i, j], dtype)
            tl.copy(y_tile, y[token * wide, row * high])

    blocks: Any = tl.macro(product)

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
