"""The ``masked`` backend: dense products with ``W⊙M``; it runs everywhere and defines what the others compute."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import Operand


class MaskedBackend:
    """Dense products with the masked matrix, kept in the compute dtype from one change of the weight to the next."""

    name = "masked"
    symmetric = True

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Return None: this backend runs everywhere."""
        return None

    def algorithms(
        self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Sequence[str]:
        """Return the one way there is: the library of dense products chooses by itself."""
        return ("",)

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        """Return an operand that holds the masked matrix."""
        return Operand(shape, (torch.empty(shape, dtype=dtype, device=device),))

    def finish_(self, operand: Operand, source: Tensor) -> None:
        """Copy the masked matrix, unless it was made in place."""
        if source is not operand.tensors[0]:
            operand.tensors[0].copy_(source)

    def product(
        self,
        operand: Operand,
        rows: Tensor,
        bias: Tensor | None = None,
        algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:
        """Return ``rows·Aᵀ + bias``, or its transpose."""
        if not transposed_output:
            return F.linear(rows, operand.tensors[0], bias)
        result = operand.tensors[0] @ rows.t()
        return result if bias is None else result + bias.unsqueeze(1)
