"""What a backend is: it says where it runs, holds a masked matrix in its own form, and multiplies by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..hardware.requirements import DTYPES
from ..kernels.metadata_order import Order

SPARSE_DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in DTYPES)
"""Dtypes of products that can run sparse."""


@dataclass
class Operand:
    """A masked matrix ``[R, C]`` (W, or Wᵀ) as a backend's products read it; filled in place, so addresses stay.

    Args:
        shape: ``(R, C)``.
        tensors: What the products read; their bytes are what the operand costs.
        values: Where the packer writes kept values ``[R, C/2]``; a view of ``tensors``. None if the backend takes the
            masked matrix itself.
        meta: Where the packer writes metadata, int16, contiguous; None if they need an order that it cannot write.
        order: Of those metadata: natural, ``[R, ceil(C/16)]``, or another.
        places: Int32, the place of every natural word in ``meta``, with ``Order.TABLE``.
    """

    shape: tuple[int, int]
    tensors: tuple[Tensor, ...]
    values: Tensor | None = None
    meta: Tensor | None = None
    order: Order = Order.NATURAL
    places: Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class Backend(Protocol):
    """A matmul backend: ``Y = X·Aᵀ`` for a masked matrix A, W for the forward product, Wᵀ for the input gradient.

    ``symmetric`` backends hold one matrix for both products.
    """

    name: str
    symmetric: bool

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Say in one sentence why products with a weight ``[O, I]`` in ``dtype`` cannot run there, or return None."""

    def algorithms(
        self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Sequence[str]:
        """Return the names of the ways to multiply tokens by ``[R, C]``; the first is the default."""

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        """Return an operand for a matrix ``[R, C]``, not filled."""

    def finish_(self, operand: Operand, source: Tensor) -> None:
        """Complete an operand, in place.

        Args:
            operand: Of this backend.
            source: The natural metadata, after ``operand.values`` were written, if they are not in ``operand.meta``
                already; or, for an operand without ``values``, the masked matrix ``[R, C]`` in the operand's dtype.
        """

    def product(
        self,
        operand: Operand,
        rows: Tensor,
        bias: Tensor | None = None,
        algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:
        """Return ``rows [T, C]`` times the operand's transpose, plus ``bias [R]``.

        Returns:
            ``[T, R]``, contiguous; or ``[R, T]``, contiguous, with ``transposed_output``.
        """
