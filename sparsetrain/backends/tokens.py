"""Tokens as vendors want them: their number a multiple, their rows where a library can read them."""

import torch.nn.functional as F
from torch import Tensor


def padded_tokens(rows: Tensor, multiple: int) -> Tensor:
    """Return ``rows [T, C]`` with zero rows behind, so that their number is a multiple; the same tensor if it is one.

    Example:
        >>> import torch
        >>> padded_tokens(torch.ones(5, 2), 8).shape
        torch.Size([8, 2])
    """
    missing = -rows.shape[0] % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def without_padding(result: Tensor, tokens: int, transposed: bool) -> Tensor:
    """Return a product ``[T, R]``, or ``[R, T]`` if ``transposed``, of the first tokens; contiguous.

    Example:
        >>> import torch
        >>> without_padding(torch.ones(3, 8), 5, transposed=True).shape
        torch.Size([3, 5])
    """
    return result[:, :tokens].contiguous() if transposed else result[:tokens]
