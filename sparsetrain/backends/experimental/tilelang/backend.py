"""The ``tilelang`` backend, experimental: products that also apply an activation, on compute capability 8.x and 9.0."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ....hardware.machine import machine_from_torch
from ....hardware.requirements import why_not
from ...interface import Operand
from .kernel import Kernel, compile_kernel, why_not_usable
from .tiles import EPILOGUES, SHAPES, Epilogue, KernelKey, Tile, tiles_for

ALIGNMENT = 16
"""Bytes that are loaded at once."""

MANY = 1 << 30
"""Tokens for which every tile is large enough."""


class TilelangBackend:
    """Products by kernels that TileLang compiles here, one for every matrix shape and tile; tokens are dynamic.

    Experimental: choose it through dispatch, which verifies its numbers first.

    Args:
        build: Makes a kernel.
        capability: Tells the compute capability of a device.
        multiprocessors: Tells how many a device has.
    """

    name = "tilelang"
    symmetric = False

    def __init__(
        self,
        build: Callable[[KernelKey], Kernel] = compile_kernel,
        capability: Callable[[torch.device], tuple[int, int] | None] | None = None,
        multiprocessors: Callable[[torch.device], int] | None = None,
    ) -> None:
        self._build = functools.cache(build)
        self._capability = functools.cache(capability or (lambda device: machine_from_torch(device).capability))
        self._multiprocessors = functools.cache(multiprocessors or _multiprocessors)
        self._why_not_usable = functools.cache(why_not_usable)

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Say in one sentence why a weight cannot run there, or return None."""
        return why_not(self.name, machine_from_torch(device), str(dtype), shape) or self._why_not_usable()

    def algorithms(
        self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
    ) -> Sequence[str]:
        """Return names of tiles, rows of A times tokens times columns of A; the default is the first."""
        return tuple(map(str, tiles_for(shape[0], tokens, self._compute_capability(device))))

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Operand:
        """Return an operand in natural order, not filled."""
        rows, columns = shape
        values = torch.zeros(rows, columns // 2, dtype=dtype, device=device)
        meta = torch.zeros(rows, columns // 16, dtype=torch.int16, device=device)
        return Operand(shape, (values, meta), values, meta)

    def finish_(self, operand: Operand, source: Tensor) -> None:
        """Do nothing: the packer writes what the kernels read."""

    def product(
        self,
        operand: Operand,
        rows: Tensor,
        bias: Tensor | None = None,
        algorithm: str = "",
        transposed_output: bool = False,
        epilogue: Epilogue | None = None,
    ) -> Tensor:
        """Return ``epilogue(rows·Aᵀ + bias)``, or its transpose, which is a copy.

        Args:
            operand: Of this backend.
            rows: ``[T, C]``, of any strides and any number of tokens, in the operand's dtype.
            bias: ``[R]``.
            algorithm: One of :meth:`algorithms`; the first by default.
            transposed_output: Return ``[R, T]``.
            epilogue: ``"relu2"`` or ``"gelu"``, in float32 before the output is rounded.

        Raises:
            ValueError: If there is no such algorithm or epilogue, or the device has no tensor cores for it.
            ImportError: If TileLang is not installed.
            RuntimeError: If TileLang does not compile the kernel.
        """
        if epilogue is not None and epilogue not in EPILOGUES:
            raise ValueError(f"epilogue is {epilogue!r}: it must be None or one of {', '.join(EPILOGUES)}.")
        tokens, device = rows.shape[0], rows.device
        capability = self._compute_capability(device)
        tile = _tile(operand.shape, tokens, capability, algorithm)
        dtype = str(rows.dtype).removeprefix("torch.")
        multiprocessors = self._multiprocessors(device)
        key = KernelKey(*operand.shape, dtype, tile, capability, bias is not None, epilogue, multiprocessors)
        result = torch.empty(tokens, operand.shape[0], dtype=rows.dtype, device=device)
        if tokens:
            given = [_readable(rows.detach())] if bias is None else [_readable(rows.detach()), _readable(bias.detach())]
            self._build(key)(*operand.tensors, *given, result)
        return result.t().contiguous() if transposed_output else result

    def _compute_capability(self, device: torch.device) -> tuple[int, int]:
        capability = self._capability(device)
        if capability is None:
            raise ValueError(f"device is {device}: tilelang needs a CUDA GPU, use masked there.")
        return capability


def _tile(shape: tuple[int, int], tokens: int, capability: tuple[int, int], algorithm: str) -> Tile:
    if not algorithm:
        return tiles_for(shape[0], tokens, capability)[0]
    every = {str(tile): tile for tile in tiles_for(shape[0], MANY, capability, len(SHAPES))}
    if algorithm not in every:
        names = ", ".join(every)
        raise ValueError(f"algorithm is {algorithm!r}: for {shape[0]}x{shape[1]} it must be one of {names}.")
    return every[algorithm]


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _readable(tensor: Tensor) -> Tensor:
    """Return a tensor as kernels read it; a copy only if it lies otherwise."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
