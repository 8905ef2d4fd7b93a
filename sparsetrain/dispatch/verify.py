"""Verification: whether a product's numbers are right on random data, and the same every time."""

from collections.abc import Callable

import torch
from torch import Tensor

SAMPLE = 64
"""Tokens, spread over all, whose exact products are computed."""

CHUNK = 1024
"""Rows of the operand that are widened to float64 at a time."""

Multiply = Callable[[Tensor], Tensor]


def exact_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``rows·matrixᵀ`` in float64, ``[T, R]``."""
    wide = rows.double()
    parts = [wide @ matrix[start : start + CHUNK].double().t() for start in range(0, matrix.shape[0], CHUNK)]
    return torch.cat(parts, dim=1)


def find_mismatch(
    multiply: Multiply, dense: Multiply, matrix: Tensor, rows: Tensor, bias: Tensor | None = None
) -> str | None:
    """Say in one sentence what is wrong first with a product, next to the dense one and an exact one, or return None.

    The error may be twice that of the dense product, the bound that every backend is held to; entries outside the
    sample may differ from the dense product by the sum of both errors and the rounding of the output. A repetition must
    give the same bits: some algorithms of vendors are wrong only now and then.

    Args:
        multiply: ``[T, C]`` to ``[T, R]``.
        dense: The same in dense form.
        matrix: The masked operand ``[R, C]``.
        rows: Random ``[T, C]``.
        bias: ``[R]``, if both products add one.

    Example:
        >>> matrix, rows = torch.randn(8, 16), torch.randn(4, 16)
        >>> find_mismatch(lambda x: x @ matrix.t(), lambda x: x @ matrix.t(), matrix, rows) is None
        True
        >>> find_mismatch(lambda x: 2 * x @ matrix.t(), lambda x: x @ matrix.t(), matrix, rows)[:13]
        'its error is '
    """
    found, expected = multiply(rows), dense(rows)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"it returns {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    sample = torch.linspace(0, rows.shape[0] - 1, min(SAMPLE, rows.shape[0]), device=rows.device).long()
    exact = exact_product(rows[sample], matrix) + (0 if bias is None else bias.double())
    allowed = float((expected[sample].double() - exact).abs().max())
    error = float((found[sample].double() - exact).abs().max())
    rounding = torch.finfo(found.dtype).eps
    floor = rounding * float(exact.abs().max())  # a dense product may be exact by chance
    if not error <= 2 * max(allowed, floor / 2):
        return f"its error is {error:.3g}, the dense product's {allowed:.3g}"
    bound = 4 * rounding * expected.abs().float() + 4 * max(allowed, floor / 2)
    if not bool(((found.float() - expected.float()).abs() <= bound).all()):
        return "some of its numbers are wrong"
    if not torch.equal(multiply(rows), found):
        return "a repetition gives other bits"
    return None
