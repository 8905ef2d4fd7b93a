"""The ``cutlass`` backend: PyTorch's own sparse products, on compute capability 8.x alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..hardware.machine import machine_from_torch
from ..hardware.requirements import why_not
from ..kernels.layouts import cutlass_layout
from ..kernels.metadata_order import Order
from ..kernels.torch_internals import semi_structured_mm
from .interface import Operand
from .padding import padded_tokens, readable_rows

TOKENS = 8
"""The operator wants a multiple of it."""


class CutlassBackend:
    """Products through ``torch.ops.aten._sparse_semi_structured_mm``."""

    name = "cutlass"
    symmetric = False

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Say in one sentence why a weight cannot run there, or return None."""
        if semi_structured_mm is None:
            return f"torch {torch.__version__} has no operator aten::_sparse_semi_structured_mm: use another backend."
        return why_not(self.name, machine_from_torch(device), str(dtype), shape)

    def algorithms(
        self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Sequence[str]:
        """Return the one way there is."""
        return ("",)

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        """Return an operand, not filled."""
        rows, columns = shape
        values = torch.zeros(rows, columns // 2, dtype=dtype, device=device)
        meta = torch.zeros(rows, columns // 16, dtype=torch.int16, device=device)
        return Operand(shape, (values, meta), values, meta, Order.CUTLASS)

    def finish_(self, operand: Operand, source: Tensor) -> None:
        """Put metadata into CUTLASS's order, in place."""
        meta = operand.tensors[1]
        cutlass_layout(*operand.shape, meta.device).arrange_(source, meta.view(-1))

    def product(
        self,
        operand: Operand,
        rows: Tensor,
        bias: Tensor | None = None,
        algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:
        """Return ``rows·Aᵀ + bias``, or its transpose; tokens are padded if they are no multiple of 8."""
        values, meta = operand.tensors
        padded = padded_tokens(readable_rows(rows), TOKENS)
        result: Tensor = semi_structured_mm(values, meta, padded.t())
        result = result[:, : rows.shape[0]]
        if bias is not None:
            result = result + bias.unsqueeze(1)
        return result.contiguous() if transposed_output else result.t().contiguous()
