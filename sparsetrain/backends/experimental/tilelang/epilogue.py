"""What the TileLang programs do with sums before they are rounded: a bias and an activation, in float32."""

from typing import Any

from .tiles import KernelKey


def epilogue_macro(tl: Any, key: KernelKey) -> Any:
    """Return a macro of a fragment ``[rows, tokens]``, the bias and the first of its rows."""
    high, wide, epilogue, with_bias = key.tile.rows, key.tile.tokens, key.epilogue, key.bias
    last = key.rows - high

    def finish(sums, bias, row):  # type: ignore[no-untyped-def]
        if with_bias:
            tl.assume(row >= 0)
            tl.assume(row <= last)
            for i, j in tl.Parallel(high, wide):
                sums[i, j] = sums[i, j] + tl.cast(bias[row + i], "float32")
        if epilogue == "relu2":
            for i, j in tl.Parallel(high, wide):
                # a NaN stays one, as in max it would not
                sums[i, j] = tl.if_then_else(sums[i, j] < 0.0, 0.0, sums[i, j] * sums[i, j])
        if epilogue == "gelu":
            for i, j in tl.Parallel(high, wide):
                sums[i, j] = 0.5 * sums[i, j] * (1.0 + tl.erf(sums[i, j] * 0.7071067811865476))

    return tl.macro(finish)
