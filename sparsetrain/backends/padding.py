"""Tokens as vendors want them: their number a multiple, their rows where a library can read them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_tokens(rows: Tensor, multiple: int) -> Tensor:
    """Return ``rows [T, C]`` with zero rows behind, so that their number is a multiple; the same tensor if it is one.

    Example:
        >>> padded_tokens(torch.ones(5, 2), 8).shape
        torch.Size([8, 2])
    """
    missing = -rows.shape[0] % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def without_padding(result: Tensor, tokens: int, transposed: bool) -> Tensor:
    """Return a product ``[T, R]``, or ``[R, T]`` if ``transposed``, of the first tokens; contiguous.

    Example:
        >>> without_padding(torch.ones(3, 8), 5, transposed=True).shape
        torch.Size([3, 5])
    """
    return result[:, :tokens].contiguous() if transposed else result[:tokens]


def readable_rows(rows: Tensor) -> Tensor:
    """Return rows as libraries can read them: along either dimension, at 16 bytes; a copy only if they are not.

    Example:
        >>> rows = torch.zeros(8, 16)
        >>> readable_rows(rows) is rows, readable_rows(rows[:, ::2]).stride()
        (True, (8, 1))
    """
    inner, outer = (rows.stride(1), rows.stride(0)) if rows.stride(1) == 1 else (rows.stride(0), rows.stride(1))
    least = rows.shape[1] if rows.stride(1) == 1 else rows.shape[0]
    if inner == 1 and outer >= least and outer % 8 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)
