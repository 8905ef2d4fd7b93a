"""Wires of dense weights and back as torch operators: Triton on CUDA, ``cpu.py`` elsewhere."""

import torch
from torch import Tensor

from ..pack.arguments import require_weight
from . import cpu
from .arguments import require_dense, require_outputs, require_patterns, require_wire, shape_of
from .numbering import numbers_of


def to_wire(weight: Tensor, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what travels of a masked weight: its kept entries, and which of the 90 patterns every tile has.

    Args:
        weight: ``[O, I]`` in float32, float16 or bfloat16, any strides; O and I multiples of 4.
        codes: int16 ``[O/4, I/4]`` on the weight's device, transposable 2:4.
        dtype: Of the values: float32, float16 or bfloat16, rounded to nearest even.

    Returns:
        ``values [O, I/2]``, the kept entries of every row in order, and ``numbers`` uint8 ``[O/4, I/4]``, from 0 to 89
        in ascending order of the patterns' codes.

    Raises:
        ValueError: If a shape, dtype or device does not fit; on a CPU also if a code is not transposable 2:4. On CUDA
            nobody waits for that: the tile has the number :data:`NO_PATTERN`.

    Example:
        >>> values, numbers = to_wire(torch.randn(8, 16), torch.full((2, 4), 0x5A5A, dtype=torch.int16), torch.bfloat16)
        >>> values.shape, numbers.shape
        (torch.Size([8, 8]), torch.Size([2, 4]))
    """
    require_weight(weight, codes, dtype)
    rows, columns = weight.shape
    values = weight.new_empty(rows, columns // 2, dtype=dtype)
    numbers = weight.new_empty(rows // 4, columns // 4, dtype=torch.uint8)
    to_wire_(weight, codes, values, numbers)
    return values, numbers


@torch.library.custom_op("sparsetrain::to_wire_", mutates_args={"values", "numbers"})
def to_wire_(weight: Tensor, codes: Tensor, values: Tensor, numbers: Tensor) -> None:
    """Do what :func:`to_wire` does into an existing wire; rows that it has beyond the weight become zero.

    Args:
        weight: As there; it may have no rows.
        codes: As there.
        values: ``[R, I/2]``, contiguous, R a multiple of 4 and at least O; overwritten.
        numbers: uint8 ``[R/4, I/4]``, contiguous; overwritten.

    Raises:
        ValueError: As there; nothing is written then.

    Example:
        >>> values, numbers = torch.empty(8, 2), torch.empty(2, 1, dtype=torch.uint8)
        >>> to_wire_(torch.ones(4, 4), torch.full((1, 1), 0x5A5A, dtype=torch.int16), values, numbers)
        >>> values[:, 0].tolist()
        [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    require_outputs(weight, codes, values, numbers)
    require_patterns(codes, numbers_of(codes))
    cpu.to_wire_into(weight, codes, values, numbers)


def from_wire(values: Tensor, numbers: Tensor) -> Tensor:
    """Return the masked weight of a wire: what was kept, bit for bit, and +0 where nothing was.

    Args:
        values: ``[O, I/2]`` in float32, float16 or bfloat16, contiguous.
        numbers: uint8 ``[O/4, I/4]``, contiguous; a tile whose number is no pattern's is zero.

    Returns:
        ``[O, I]`` in the values' dtype.

    Raises:
        ValueError: If a shape, dtype or device does not fit.

    Example:
        >>> from_wire(torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.uint8)).tolist()[0]
        [0.0, 0.0, 1.0, 1.0]
    """
    require_wire(values, numbers)
    dense = values.new_empty(shape_of(values))
    from_wire_(values, numbers, dense)
    return dense


@torch.library.custom_op("sparsetrain::from_wire_", mutates_args={"dense"})
def from_wire_(values: Tensor, numbers: Tensor, dense: Tensor) -> None:
    """Do what :func:`from_wire` does into an existing weight.

    Args:
        values: As there.
        numbers: As there.
        dense: ``[O, I]`` in the values' dtype, contiguous; overwritten.

    Raises:
        ValueError: If a shape, dtype or device does not fit; nothing is written then.

    Example:
        >>> dense = torch.empty(4, 4)
        >>> from_wire_(torch.ones(4, 2), torch.zeros(1, 1, dtype=torch.uint8), dense)
        >>> dense.sum().item()
        8.0
    """
    require_dense(values, numbers, dense)
    cpu.from_wire_into(values, numbers, dense)


@to_wire_.register_fake
def _(weight: Tensor, codes: Tensor, values: Tensor, numbers: Tensor) -> None:
    require_outputs(weight, codes, values, numbers)


@from_wire_.register_fake
def _(values: Tensor, numbers: Tensor, dense: Tensor) -> None:
    require_dense(values, numbers, dense)


@to_wire_.register_kernel("cuda")
def _(weight: Tensor, codes: Tensor, values: Tensor, numbers: Tensor) -> None:
    from .triton_dense import to_wire_into

    require_outputs(weight, codes, values, numbers)
    if not weight.numel():
        values.zero_()
        numbers.zero_()
        return
    to_wire_into(weight if weight.stride(1) == 1 else weight.contiguous(), codes.contiguous(), values, numbers)


@from_wire_.register_kernel("cuda")
def _(values: Tensor, numbers: Tensor, dense: Tensor) -> None:
    from .triton_dense import from_wire_into

    require_dense(values, numbers, dense)
    if dense.numel():
        from_wire_into(values, numbers, dense)
