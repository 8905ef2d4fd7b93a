"""The TileLang program for compute capability 8.x: warps multiply what they copied themselves, a few steps ahead."""

from typing import Any

from .epilogue import epilogue_macro
from .tiles import KernelKey


def blocks(tilelang: Any, key: KernelKey) -> Any:
    """Return the function of values, metadata, tokens, bias and output that TileLang parses."""
    tl: Any = tilelang.language
    tile, dtype = key.tile, key.dtype
    high, wide, deep = tile.rows, tile.tokens, tile.columns
    stages, threads = tile.stages(key.capability), tile.threads
    columns, rows = key.columns, key.rows
    finish = epilogue_macro(tl, key)
    policy = tl.GemmWarpPolicy.Square  # warps keep operands in registers: squares read least
    swizzled = tilelang.layout.make_swizzled_layout

    def product(values, meta, x, bias, y):  # type: ignore[no-untyped-def]
        tokens = x.shape[0]
        with tl.Kernel(rows // high, tl.ceildiv(tokens, wide), threads=threads) as (row, token):
            value_tile = tl.alloc_shared((high, deep // 2), dtype)
            meta_tile = tl.alloc_shared((high, deep // 16), "int16")
            x_tile = tl.alloc_shared((wide, deep), dtype)
            y_tile = tl.alloc_shared((wide, high), dtype)
            sums = tl.alloc_fragment((high, wide), "float32")
            tl.annotate_layout({y_tile: swizzled(y_tile)})
            tl.use_swizzle(panel_size=8)
            tl.clear(sums)
            for step in tl.Pipelined(columns // deep, num_stages=stages):
                tl.copy(values[row * high, step * (deep // 2)], value_tile)
                tl.copy(meta[row * high, step * (deep // 16)], meta_tile)
                tl.copy(x[token * wide, step * deep], x_tile)
                tl.gemm_sp(value_tile, meta_tile, x_tile, sums, transpose_B=True, policy=policy)
            finish(sums, bias, row * high)
            for i, j in tl.Parallel(high, wide):
                y_tile[j, i] = tl.cast(sums[i, j], dtype)
            tl.copy(y_tile, y[token * wide, row * high])

    return product
