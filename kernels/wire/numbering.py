"""Numbers of the 90 transposable patterns, in the order of their tile codes, and tables of what kernels ask of them."""

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import product

import torch
from torch import Tensor

from ..pointer_tables import table

NO_PATTERN = 255
"""What a tile has for a number whose code keeps not two of every row and column."""

_LINES = (0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100)


def _codes() -> Iterator[int]:
    for lines in product(_LINES, repeat=4):  # the last row first: its bits are the highest
        if all(sum(line >> column & 1 for line in lines) == 2 for column in range(4)):
            yield sum(line << shift for line, shift in zip(lines, (12, 8, 4, 0), strict=True))


CODES = tuple(_codes())
"""Tile codes of the patterns, without their sign: number n is that of ``CODES[n]``, and they ascend."""


def codes_of(numbers: Tensor) -> Tensor:
    """Return the tile codes of numbers; what is no pattern's number gives a code that keeps nothing.

    Args:
        numbers: uint8, any shape.

    Returns:
        int16, same shape.

    Example:
        >>> [hex(code) for code in codes_of(torch.tensor([0, 1], dtype=torch.uint8)).tolist()], len(CODES)
        (['0x33cc', '0x35ac'], 90)
    """
    return _codes_by_number(numbers.device)[numbers.int()]


def numbers_of(codes: Tensor) -> Tensor:
    """Return the numbers of tile codes; :data:`NO_PATTERN` for a code that is not transposable 2:4.

    Args:
        codes: int16, any shape.

    Returns:
        uint8, same shape.

    Example:
        >>> numbers_of(torch.tensor([0x33CC, -1], dtype=torch.int16)).tolist()
        [0, 255]
    """
    return _numbers_by_code(codes.device)[codes.int() & 0xFFFF]


def pattern_table(device: torch.device) -> Tensor:
    """Return what kernels read of a pattern by its number, as one int64 of four times 16 bits; 0 if there is none.

    From the low end: the tile code, that of the transposed tile, and the metadata of both: a nibble for each line.

    Returns:
        int64 ``[256]``. Do not write to it.

    Example:
        >>> hex(pattern_table(torch.device("cpu"))[0].item() & 0xFFFFFFFFFFFFFFFF)
        '0x44ee44ee33cc33cc'
    """
    return table(_patterns(), device)


@cache
def _patterns() -> tuple[int, ...]:
    found = []
    for code in CODES:
        rows = [code >> 4 * row & 15 for row in range(4)]
        columns = [sum((row >> column & 1) << place for place, row in enumerate(rows)) for column in range(4)]
        fields = [*rows, *columns, *map(_metadata, rows), *map(_metadata, columns)]
        bits = sum(field << 4 * place for place, field in enumerate(fields))
        found.append(bits - (bits >> 63 << 64))
    return (*found, *[0] * (256 - len(found)))


def _metadata(line: int) -> int:
    """Return ``i0 | i1 << 2`` of a nibble that keeps i0 < i1."""
    first, last = (position for position in range(4) if line >> position & 1)
    return first | last << 2


@lru_cache(maxsize=16)
def _codes_by_number(device: torch.device) -> Tensor:
    return torch.tensor([*CODES, *[0] * (256 - len(CODES))], device=device).to(torch.int16)


@lru_cache(maxsize=16)
def _numbers_by_code(device: torch.device) -> Tensor:
    numbers = torch.full((1 << 16,), NO_PATTERN, dtype=torch.uint8, device=device)
    numbers[torch.tensor(CODES, device=device)] = torch.arange(len(CODES), dtype=torch.uint8, device=device)
    return numbers
