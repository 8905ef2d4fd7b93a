"""Where a word of metadata lies in the orders of GEMM libraries: integer arithmetic, for ints and tensors."""

from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

Index = TypeVar("Index", int, Tensor)


class Order(IntEnum):
    """How metadata are ordered; :func:`metadata_place` says where a word lies, here and in kernels.

    Example:
        >>> Order.CUTLASS_SM90_4.name, int(Order.NATURAL)
        ('CUTLASS_SM90_4', 0)
    """

    NATURAL = 0
    """Row by row."""
    TABLE = 1
    """As a table of places says."""
    CUTLASS = 2
    CUSPARSELT_SM80 = 3
    CUTLASS_SM90_1 = 4
    CUTLASS_SM90_2 = 5
    CUTLASS_SM90_4 = 6


SM90_BLOCKS = {Order.CUTLASS_SM90_1: 1, Order.CUTLASS_SM90_2: 2, Order.CUTLASS_SM90_4: 4}
"""Blocks of 32 columns in an atom of CUTLASS's orders on compute capability 9.0."""

_ATOMS = {Order.CUTLASS: (32, 2), Order.CUSPARSELT_SM80: (128, 8)} | {
    order: (64, 2 * blocks) for order, blocks in SM90_BLOCKS.items()
}  # rows and words of which a matrix needs whole ones


def place_in_block(row: Index, word: Index) -> Index:
    """Return the place of a word among the 64 of its block of 32 rows × 32 columns; both orders of 8.x share it.

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


def cutlass_sm90_place(row: Index, word: Index, rows: int, blocks: int) -> Index:
    """Return where a word lies in the metadata that CUTLASS reads on compute capability 9.0, for 16-bit values.

    Args:
        row: Of the matrix ``[R, C]``.
        word: Column of the natural metadata ``[R, C/16]``.
        rows: R, which counts as its next multiple of 64.
        blocks: N, blocks of 32 columns in an atom: 1, 2 or 4 for a K tile of 32·N.

    Returns:
        Place in a buffer of atoms of 64 rows × 32·N columns, one column of atoms after the other.

    Example:
        >>> [cutlass_sm90_place(*at, rows=128, blocks=4) for at in ((8, 0), (0, 2), (1, 0), (0, 1), (16, 0), (64, 0))]
        [1, 2, 8, 64, 128, 512]

    Source: the interleaved 16-bit metadata of CUTLASS's sparse collectives for sm_90 (``sm90_sparse_config.inl``).
    """
    atom = (word // (2 * blocks)) * ((rows + 63) // 64) + row // 64
    place = row // 8 % 2 + word // 2 % blocks * 2 + row % 8 * (2 * blocks)
    return atom * (128 * blocks) + place + word % 2 * (16 * blocks) + row // 16 % 4 * (32 * blocks)


def metadata_place(
    row: Index, word: Index, word_columns: int, rows: int, order: Order, table: Tensor | None = None
) -> Index:
    """Return where a word of natural metadata lies in an order.

    Args:
        row: Of the matrix ``[R, C]``.
        word: Column of the natural metadata ``[R, ceil(C/16)]``.
        word_columns: ``ceil(C/16)``.
        rows: R.
        order: Which fits the sizes, see :func:`metadata_words`.
        table: With ``Order.TABLE``: int32 ``[R·word_columns]``, the place of every word.

    Example:
        >>> metadata_place(1, 2, 4, 8, Order.NATURAL), metadata_place(8, 0, 4, 64, Order.CUTLASS_SM90_1)
        (6, 1)
    """
    natural = row * word_columns + word
    if order == Order.TABLE:
        assert table is not None
        return table[natural]  # type: ignore[return-value]  # a table is asked for tensors
    if order == Order.CUTLASS:
        return cutlass_place(row, word, rows)
    if order == Order.CUSPARSELT_SM80:
        return cusparselt_sm80_place(row, word, rows)
    if order in SM90_BLOCKS:
        return cutlass_sm90_place(row, word, rows, SM90_BLOCKS[order])
    return natural


def metadata_words(rows: int, columns: int, order: Order) -> int:
    """Return how many words the metadata of ``[rows, columns]`` take in an order without a table; 0 if it has none.

    Example:
        >>> metadata_words(64, 32, Order.CUTLASS_SM90_1), metadata_words(80, 48, Order.CUTLASS_SM90_1)
        (128, 512)
        >>> metadata_words(80, 48, Order.CUTLASS)
        0
    """
    words = -(-columns // 16)
    if order == Order.NATURAL:
        return rows * words
    if order not in _ATOMS or rows < 1 or columns < 1 or columns % 16:
        return 0
    high, wide = _ATOMS[order]
    if order not in SM90_BLOCKS and (rows % high or words % wide):
        return 0
    return (rows + -rows % high) * (words + -words % wide)


def metadata_places(rows: int, columns: int, order: Order, device: torch.device, table: Tensor | None = None) -> Tensor:
    """Return the place of every word, int64 ``[rows, ceil(columns/16)]``.

    Example:
        >>> metadata_places(2, 32, Order.NATURAL, torch.device("cpu")).tolist()
        [[0, 1], [2, 3]]
    """
    words = -(-columns // 16)
    row = torch.arange(rows, device=device)[:, None]
    word = torch.arange(words, device=device)[None, :]
    return metadata_place(row, word, words, rows, order, table).long()
