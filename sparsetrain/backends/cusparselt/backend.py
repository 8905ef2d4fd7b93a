"""The ``cusparselt`` backend: products on the sparse tensor cores of compute capability 8.0 and higher."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...hardware.machine import cache_folder, machine_from_torch
from ...hardware.requirements import why_not
from ...kernels.metadata_order import Order
from ..interface import Operand
from ..padding import padded_tokens, readable_rows, without_padding
from .metadata_layout import LayoutKey, MetadataLayout, prove_layout
from .providers import NvmathProvider, Provider, TorchProvider

TOKENS = 8
"""The library wants a multiple of it."""


@dataclass
class CompressedOperand(Operand):
    """An operand in cuSPARSELt's format: one buffer, values first; and the order of its metadata."""

    layout: MetadataLayout | None = None


class CuSparseLtBackend:
    """Products through cuSPARSELt; packed by our kernel where its order of metadata was proven, else by the library.

    Args:
        providers: Ways to the library, the best first.
    """

    name = "cusparselt"
    symmetric = False

    def __init__(self, providers: Sequence[Provider] = ()) -> None:
        self._providers = tuple(providers) or (NvmathProvider(), TorchProvider())

    @functools.cached_property
    def provider(self) -> Provider:
        """The first way that is open; the last if none is."""
        return next((way for way in self._providers if way.why_not() is None), self._providers[-1])

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Say in one sentence why a weight cannot run there, or return None."""
        return why_not(self.name, machine_from_torch(device), str(dtype), shape) or self.provider.why_not()

    def algorithms(
        self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Sequence[str]:
        """Return the library's algorithms for a product."""
        with torch.cuda.device(device) if device.type == "cuda" else torch.no_grad():
            return self.provider.algorithms(shape, tokens + -tokens % TOKENS, dtype)

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        """Return an operand; at the first one of a shape, the order of the metadata is proven."""
        rows, columns = shape
        compress = self.provider.compress
        key = LayoutKey(self._environment(device), rows, columns, dtype)
        layout = prove_layout(lambda matrix: compress(matrix).contiguous(), key, device, cache_folder())
        kept = rows * columns // 2
        if layout.table is None:
            # zeros are a 2:4 matrix, of the size that all of this shape have
            buffer = compress(torch.zeros(shape, dtype=dtype, device=device))
            return CompressedOperand(shape, (buffer,), layout=layout)
        buffer = torch.zeros(kept + layout.table.words, dtype=dtype, device=device)
        values, tail = buffer[:kept].view(rows, columns // 2), buffer[kept:].view(torch.int16)
        places = layout.table.places if layout.order == Order.TABLE else None
        if layout.order == Order.TABLE and places is None:  # bytes or nibbles are moved
            return CompressedOperand(shape, (buffer,), values, layout=layout)
        layout.table.pad_(tail)
        return CompressedOperand(shape, (buffer,), values, tail, layout.order, places, layout)

    def finish_(self, operand: Operand, source: Tensor) -> None:
        """Put metadata behind the values, or compress the masked matrix; in place."""
        assert isinstance(operand, CompressedOperand)
        (buffer,) = operand.tensors
        if operand.layout is None or operand.layout.table is None:
            self.provider.compress(source, buffer)
        else:
            operand.layout.arrange_(source, buffer[operand.shape[0] * operand.shape[1] // 2 :])

    def product(
        self,
        operand: Operand,
        rows: Tensor,
        bias: Tensor | None = None,
        algorithm: str = "",
        transposed_output: bool = False,
    ) -> Tensor:
        """Return ``rows·Aᵀ + bias``, or its transpose; tokens are padded to a multiple of 8."""
        tokens = rows.shape[0]
        given = padded_tokens(readable_rows(rows), TOKENS)
        result = self.provider.multiply(operand.tensors[0], operand.shape, given, bias, algorithm, transposed_output)
        return result if tokens == given.shape[0] else without_padding(result, tokens, transposed_output)

    def _environment(self, device: torch.device) -> str:
        capability = machine_from_torch(device).capability
        architecture = "no GPU" if capability is None else f"sm_{capability[0]}{capability[1]}"
        return f"{architecture} cuSPARSELt {self.provider.version()}"
