"""Where a word of metadata lies in the orders of GEMM libraries: integer arithmetic, for ints and tensors."""

from typing import TypeVar

from torch import Tensor

Index = TypeVar("Index", int, Tensor)


def place_in_block(row: Index, word: Index) -> Index:
    """Return the place of a word among the 64 of its block of 32 rows × 32 columns; both orders share it.

    Args:
        row: Of the matrix.
        word: Column of the natural metadata ``[R, C/16]``.

    Example:
        >>> [place_in_block(row, word) for row, word in ((0, 0), (8, 0), (0, 1), (16, 0), (1, 0))]
        [0, 1, 2, 4, 8]
    """
    # rows 8 apart share 32 bits, then the two words of a row, then rows 16 apart, then the rows of an octet
    return (row % 8) * 8 + (row // 16 % 2) * 4 + (word % 2) * 2 + row // 8 % 2


def cutlass_place(row: Index, word: Index, rows: int) -> Index:
    """Return where a word lies in the metadata that CUTLASS reads on compute capability 8.x, for 16-bit values.

    Args:
        row: Of the matrix ``[R, C]``; R a multiple of 32, C of 32.
        word: Column of the natural metadata ``[R, C/16]``.
        rows: R.

    Returns:
        Place in the buffer of R·C/16 words: blocks of 32 × 32, one column of blocks after the other.

    Example:
        >>> cutlass_place(33, 2, rows=64)
        200
    """
    return (word // 2) * (2 * rows) + (row // 32) * 64 + place_in_block(row, word)


def cusparselt_sm80_place(row: Index, word: Index, rows: int) -> Index:
    """Return where a word lies in the metadata that cuSPARSELt is believed to read on 8.x, for 16-bit values.

    Args:
        row: Of the matrix ``[R, C]``; R and C multiples of 128.
        word: Column of the natural metadata ``[R, C/16]``.
        rows: R.

    Returns:
        Place among the R·C/16 words behind the values: tiles of 128 × 64, one column of tiles after the other; in a
        tile, the four blocks of its left half, then those of its right half.

    Example:
        >>> cusparselt_sm80_place(33, 2, rows=128)
        328
    """
    tile = (word // 4) * (rows // 128) + row // 128
    return tile * 512 + (word // 2 % 2) * 256 + (row // 32 % 4) * 64 + place_in_block(row, word)
