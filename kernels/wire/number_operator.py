"""Numbers of tile codes and back as torch operators: Triton on CUDA, tables elsewhere."""

import torch
from torch import Tensor

from .arguments import require_dtype, require_patterns
from .numbering import codes_of, numbers_of


@torch.library.custom_op("sparsetrain::codes_of_numbers", mutates_args=())
def codes_of_numbers(numbers: Tensor) -> Tensor:
    """Return the tile codes of a wire's numbers; 0, which keeps nothing, for what is no pattern's number.

    Args:
        numbers: uint8, any shape.

    Returns:
        int16, same shape, contiguous.

    Raises:
        ValueError: If the numbers are not uint8.

    Example:
        >>> hex(codes_of_numbers(torch.tensor([23], dtype=torch.uint8)).item())
        '0x5a5a'
    """
    require_dtype("numbers", numbers, torch.uint8)
    return codes_of(numbers.contiguous())


@torch.library.custom_op("sparsetrain::numbers_of_codes", mutates_args=())
def numbers_of_codes(codes: Tensor) -> Tensor:
    """Return the numbers of tile codes.

    Args:
        codes: int16, any shape; transposable 2:4.

    Returns:
        uint8, same shape, contiguous: from 0 to 89 in ascending order of the codes.

    Raises:
        ValueError: If the codes are not int16; on a CPU also if one is not transposable 2:4. On CUDA nobody waits for
            that: its number is :data:`NO_PATTERN`.

    Example:
        >>> numbers_of_codes(torch.tensor([0x33CC, 0x5A5A], dtype=torch.int16)).tolist()
        [0, 23]
    """
    require_dtype("codes", codes, torch.int16)
    numbers = numbers_of(codes.contiguous())
    require_patterns(codes, numbers)
    return numbers


@codes_of_numbers.register_fake
def _(numbers: Tensor) -> Tensor:
    require_dtype("numbers", numbers, torch.uint8)
    return numbers.new_empty(numbers.shape, dtype=torch.int16)


@numbers_of_codes.register_fake
def _(codes: Tensor) -> Tensor:
    require_dtype("codes", codes, torch.int16)
    return codes.new_empty(codes.shape, dtype=torch.uint8)


@codes_of_numbers.register_kernel("cuda")
def _(numbers: Tensor) -> Tensor:
    from .triton_dense import codes_into

    require_dtype("numbers", numbers, torch.uint8)
    codes = numbers.new_empty(numbers.shape, dtype=torch.int16)
    if numbers.numel():
        codes_into(numbers.contiguous(), codes)
    return codes


@numbers_of_codes.register_kernel("cuda")
def _(codes: Tensor) -> Tensor:
    from .triton_dense import numbers_into

    require_dtype("codes", codes, torch.int16)
    numbers = codes.new_empty(codes.shape, dtype=torch.uint8)
    if codes.numel():
        numbers_into(codes.contiguous(), numbers)
    return numbers
