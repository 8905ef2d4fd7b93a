"""Metadata between natural order and the orders of GEMM libraries, in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..metadata_order import cusparselt_sm80_place, cutlass_place

Place = Callable[[Tensor, Tensor, int], Tensor]


def to_cutlass(meta: Tensor) -> Tensor:
    """Reorder natural metadata for CUTLASS on compute capability 8.x; values stay as they are.

    Args:
        meta: int16 ``[R, C/16]`` of 16-bit values; R a multiple of 32, C of 32.

    Returns:
        int16 ``[R, C/16]``, contiguous.

    Raises:
        ValueError: If the sizes or the dtype do not fit.

    Example:
        >>> torch.equal(from_cutlass(to_cutlass(torch.arange(128).short().view(64, 2))).flatten(), torch.arange(128))
        True

    Source: the interleaved layout of CUTLASS's sparse GEMM for 16-bit operands; equal to torch's own conversion.
    """
    _check("CUTLASS", meta, rows=32, words=2)
    return _scatter(meta, cutlass_place).view(meta.shape)


def from_cutlass(meta: Tensor) -> Tensor:
    """Undo :func:`to_cutlass`.

    Example:
        >>> from_cutlass(torch.zeros(32, 2, dtype=torch.int16)).shape
        torch.Size([32, 2])
    """
    _check("CUTLASS", meta, rows=32, words=2)
    return meta.flatten()[_places(meta, cutlass_place)]


def to_cusparselt_sm80(values: Tensor, meta: Tensor) -> Tensor:
    """Put packed rows into one buffer as cuSPARSELt is believed to lay them out on compute capability 8.x.

    Args:
        values: float16 or bfloat16 ``[R, C/2]``.
        meta: int16 ``[R, C/16]``, natural order; R and C multiples of 128.

    Returns:
        ``[R·C·9/16]`` in the values' dtype: the values, then the reordered words as bits.

    Raises:
        ValueError: If the sizes or a dtype do not fit.

    Example:
        >>> to_cusparselt_sm80(torch.zeros(128, 64).half(), torch.zeros(128, 8, dtype=torch.int16)).shape
        torch.Size([9216])

    Source: the vendor documents no order; this one is what torch's tile operator writes, and has to be proven against
    the vendor's compressor on the machine before it is used.
    """
    _check_values(values, meta)
    return torch.cat([values.flatten(), _scatter(meta, cusparselt_sm80_place).view(values.dtype)])


def from_cusparselt_sm80(buffer: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`to_cusparselt_sm80`: return ``values [R, C/2]`` and natural ``meta [R, C/16]``.

    Example:
        >>> values, meta = from_cusparselt_sm80(torch.zeros(9216).half(), 128, 128)
        >>> values.shape, meta.shape
        (torch.Size([128, 64]), torch.Size([128, 8]))
    """
    if buffer.dim() != 1 or buffer.numel() != rows * columns * 9 // 16:
        raise ValueError(
            f"buffer has shape {tuple(buffer.shape)}: for {rows} × {columns} it must be [{rows * columns * 9 // 16}]."
        )
    values, words = buffer[: rows * columns // 2], buffer[rows * columns // 2 :]
    values, words = values.view(rows, columns // 2), words.view(torch.int16).view(rows, columns // 16)
    _check_values(values, words)
    return values, words.flatten()[_places(words, cusparselt_sm80_place)]


def _places(meta: Tensor, place: Place) -> Tensor:
    row = torch.arange(meta.shape[0], device=meta.device)[:, None]
    word = torch.arange(meta.shape[1], device=meta.device)[None, :]
    return place(row, word, meta.shape[0])


def _scatter(meta: Tensor, place: Place) -> Tensor:
    return torch.empty_like(meta.flatten()).scatter_(0, _places(meta, place).flatten(), meta.flatten())


def _check(layout: str, meta: Tensor, rows: int, words: int) -> None:
    if meta.dtype != torch.int16 or meta.dim() != 2 or meta.shape[0] % rows or meta.shape[1] % words:
        raise ValueError(
            f"meta is {meta.dtype} {tuple(meta.shape)}: the {layout} layout needs torch.int16 [R, C/16] with R a "
            f"multiple of {rows} and C of {16 * words}, so pad the weight."
        )


def _check_values(values: Tensor, meta: Tensor) -> None:
    _check("cuSPARSELt", meta, rows=128, words=8)
    shape = (meta.shape[0], 8 * meta.shape[1])
    if values.dtype not in (torch.float16, torch.bfloat16) or tuple(values.shape) != shape:
        raise ValueError(
            f"values is {values.dtype} {tuple(values.shape)}: with meta {tuple(meta.shape)} it must be float16 or "
            f"bfloat16 {shape}."
        )
