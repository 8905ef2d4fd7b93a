"""The backends that a weight's products have got: from memory, the table or a benchmark, and dense where one fails."""

import logging
from typing import get_args

import torch
from torch import Tensor

from ..backends.interface import SPARSE_DTYPES
from ..dispatch import MASKED, Choice, Problem, Product, bucket, tuner_for
from .operands import Operands

LOG = logging.getLogger("sparsetrain")

AUTO_DEVICES = ("cuda",)
"""Types of devices where ``backend="auto"`` has a choice, for products in ``SPARSE_DTYPES``; else it is ``masked``."""


def backend_on(device: str, backend: str) -> str:
    """Return a backend's name on a type of device: ``"masked"`` for ``"auto"`` where there is nothing to choose from.

    Example:
        >>> backend_on("cpu", "auto"), backend_on("cuda", "auto"), backend_on("cpu", "cutlass")
        ('masked', 'auto', 'cutlass')
    """
    return MASKED.backend if backend == "auto" and device not in AUTO_DEVICES else backend


def describe(operands: Operands) -> str:
    """Return the backend of each product of a weight, as far as it has been decided.

    Example:
        >>> from .execution import Execution
        >>> describe(Operands(Execution())), describe(Operands(Execution("masked")))
        ('not decided yet', 'masked')
    """
    texts: dict[str, None] = {}  # in order, once each
    for (product, tokens, *_), choice in sorted(operands.choices.items(), key=lambda item: str(item[0])):
        texts[f"{product.replace('_', ' ')} {choice} at {tokens} tokens"] = None
    execution = operands.execution
    undecided = "masked" if execution.backend == "masked" else "not decided yet"
    return ", ".join(texts) or (f"{undecided}: {execution.note}" if execution.note else undecided)


def fall_back_to_dense(
    operands: Operands, rows: Tensor, bias: bool, product: Product, choice: Choice, error: Exception
) -> None:
    """Compute a product densely from now on, because the choice fails for this number of tokens."""
    LOG.warning("%s fails for %d tokens and is given up for them: %s", choice, rows.shape[0], error)
    operands.choices[product, bucket(rows.size(0)), rows.dtype, bias, "auto"] = MASKED


def choose(
    operands: Operands, rows: Tensor, shape: tuple[int, int], bias: bool, product: Product, backend: str = "auto"
) -> Choice:
    """Return the backend of a product of this weight, from memory, the table or a benchmark.

    Args:
        operands: Of the weight.
        rows: The dense operand, ``[T, ...]``.
        shape: ``(O, I)`` of the weight.
        bias: Whether one is added.
        product: Which of the three.
        backend: A backend's name, or ``"auto"``.

    Raises:
        ValueError: If a backend is named that cannot run here.
    """
    key = product, bucket(rows.size(0)), rows.dtype, bias, backend
    known = operands.choices.get(key)
    if known is not None:
        return known
    if product not in get_args(Product):
        raise ValueError(f"product is {product!r}: it must be one of {', '.join(map(repr, get_args(Product)))}.")
    if rows.shape[0] == 0 or backend == MASKED.backend or (backend == "auto" and rows.dtype not in SPARSE_DTYPES):
        return MASKED
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return MASKED  # nothing can be measured now, and the next call outside the graph will
    problem = Problem(product, shape, rows.shape[0], rows.dtype, bias)
    deterministic = operands.execution.deterministic
    choice = tuner_for(rows.device).choose(problem, rows.device, backend, deterministic)
    operands.choices[key] = choice
    return choice
