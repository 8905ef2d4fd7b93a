"""``masked_matmul``: a dense matrix times a masked weight, or its transpose, by the backend that dispatch chooses."""

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..dispatch import MASKED, Product, bucket
from .choices import choose, fall_back_to_dense
from .execution import Execution
from .operands import Operands
from .registry import operands_of
from .tensor_state import Stamp

# define and impl instead of custom_op: it costs 5 microseconds less a call on the host
LIBRARY = torch.library.Library("sparsetrain", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "masked_matmul(Tensor rows, Tensor weight, Tensor codes, Tensor? bias, str product, str backend, "
    "Tensor? backward_codes=None) -> Tensor",
    # it keeps memory of its own, which a pool of recorded graphs must not own
    tags=(torch.Tag.cudagraph_unsafe,),
)


def masked_matmul(
    rows: Tensor,
    weight: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
    product: Product = "forward",
    backend: str = "auto",
    backward_codes: Tensor | None = None,
) -> Tensor:
    """Return ``rows·(W⊙M)ᵀ + bias``, the forward product, or ``rows·(W⊙M)``, the input gradient's.

    The packed weight is kept from call to call if the weight belongs to a :class:`sparsetrain.SparseLinear`; it is
    renewed when weight or codes have changed. Gradients are the business of :func:`sparsetrain.sparse_linear`.

    Args:
        rows: ``[T, I]``, or ``[T, O]`` for the input gradient; in the dtype of the product.
        weight: ``[O, I]``, the dense master, in any dtype.
        codes: int16 ``[O/4, I/4]``; transposable for a sparse input gradient without ``backward_codes``.
        bias: ``[O]`` (``[I]`` for the input gradient) or None, in any dtype.
        product: ``"forward"`` or ``"input_gradient"``.
        backend: A backend's name, or ``"auto"``.
        backward_codes: int16 ``[O/4, I/4]`` that keep two of every four along ``out_features``: the input gradient's W
            is masked by both codes. For the forward, they tell how the other product's operand is packed.

    Returns:
        ``[T, O]``, or ``[T, I]`` for the input gradient, in the dtype of ``rows``, contiguous.

    Raises:
        ValueError: If the backend cannot run here.

    Example:
        >>> codes = torch.full((1, 1), 0xF, dtype=torch.int16)  # keeps the first of four rows
        >>> masked_matmul(torch.ones(1, 4), torch.ones(4, 4), codes).tolist()
        [[4.0, 0.0, 0.0, 0.0]]
    """
    given = (rows, weight, codes, bias, product, backend, backward_codes)
    result: Tensor = torch.ops.sparsetrain.masked_matmul(*given)
    return result


def _multiply(
    rows: Tensor,
    weight: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    product: Product,
    backend: str,
    backward_codes: Tensor | None = None,
) -> Tensor:
    operands = operands_of(codes) or Operands(Execution(backend))
    return multiply_rows(operands, rows, weight, codes, bias, product, backend, backward_codes)


def multiply_rows(
    operands: Operands,
    rows: Tensor,
    weight: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    product: Product,
    backend: str,
    backward_codes: Tensor | None = None,
    stamp: Stamp | None = None,
) -> Tensor:
    """Do what :func:`masked_matmul` does, with operands at hand and without a dispatcher that others can follow.

    A stamp is ``operands.stamp`` after the forward product whose weight and codes these still are.
    """
    dtype = rows.dtype
    choice = operands.choices.get((product, bucket(rows.size(0)), dtype, bias is not None, backend))
    if choice is None:
        choice = choose(operands, rows, (weight.shape[0], weight.shape[1]), bias is not None, product, backend)
    added = bias if bias is None else operands.bias(bias, dtype)
    if choice.backend != MASKED.backend:
        try:
            chosen = BACKENDS[choice.backend]
            operand = operands.at(stamp, chosen, product, dtype) or operands.get(
                weight, codes, chosen, product, dtype, backward_codes
            )
            return chosen.product(operand, rows, added, choice.algorithm)
        except RuntimeError as error:
            if backend != "auto" or isinstance(error, torch.OutOfMemoryError):
                raise
            fall_back_to_dense(operands, rows, bias is not None, product, choice, error)
    operand = operands.get(weight, codes, BACKENDS["masked"], product, dtype, backward_codes)
    return BACKENDS["masked"].product(operand, rows, added)


def _shape_of_product(
    rows: Tensor,
    weight: Tensor,
    codes: Tensor,
    bias: Tensor | None,
    product: Product,
    backend: str,
    backward_codes: Tensor | None = None,
) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1 if product == "input_gradient" else 0])


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("masked_matmul", _multiply, _device)  # type: ignore[no-untyped-call]
torch.library.register_fake("sparsetrain::masked_matmul", _shape_of_product, lib=LIBRARY)
