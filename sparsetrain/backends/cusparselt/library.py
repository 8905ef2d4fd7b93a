"""The calls of cuSPARSELt that are used here, each with its arguments, and what is asked of the CUDA runtime.

Facts the calls rely on (headers of cuSPARSELt 0.7.1–0.8.1, and how PyTorch calls it):

- ``streams`` of a product is a ``cudaStream_t*``, a host array with ``num_streams`` handles; compressing takes the
  handle itself.
- ``alpha`` and ``beta`` are host floats under ``COMPUTE_32F``; with ``beta`` 0, C may be D, pointer and descriptor.
- The bias has one value per row of D, of D's type; its address is part of the descriptor, its values are read when the
  product runs. Attributes are set before the selection and the plan are made.
- A handle belongs to the device that is current when it is made.
- The bindings allocate every opaque struct, and their ``*_destroy`` frees it. A plan may point into its selection and
  descriptors, so they live as long as it does.
- Opaque structs are host memory and a launch copies what it needs: PyTorch destroys its plan right after the launch.

Not documented, to be checked on a GPU: that a selection without ``CONFIG_ID`` is the library's own choice, which
alignment a bias needs (16 bytes are asked for here).
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ...hardware.extras import require
from ...kernels.torch_internals import current_raw_stream

Order: TypeAlias = Literal["rows", "columns"]
"""rows: a row is contiguous (row-major); columns: a column is."""

DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
ORDERS = {"columns": 1, "rows": 2}  # cusparseOrder_t
ALIGNMENT = 16  # bytes
_NON_TRANSPOSE = 0  # cusparseOperation_t
_VERSION_PARTS = (0, 1, 2)  # libraryPropertyType: major, minor, patch

_Bytes: TypeAlias = "ctypes.Array[ctypes.c_char]"


class Devices(Protocol):
    """What is asked of the CUDA runtime; tests give another one."""

    def index(self, tensor: Tensor) -> int:
        """Return the number of the tensor's device, or a negative number if it is on none."""

    def current(self) -> int:
        """Return the number of the current device."""

    def guard(self, index: int) -> AbstractContextManager[Any]:
        """Make a device the current one for a while."""

    def stream(self, index: int) -> int:
        """Return the handle of a device's current stream."""

    def is_capturing(self) -> bool:
        """Say whether the current stream is being captured into a CUDA graph."""


class CudaDevices:
    """The CUDA runtime as PyTorch sees it."""

    def index(self, tensor: Tensor) -> int:
        """Return the number of the tensor's device, or -1 on the CPU."""
        return tensor.get_device()

    def current(self) -> int:
        """Return the number of the current device."""
        return torch.cuda.current_device()

    def guard(self, index: int) -> AbstractContextManager[Any]:
        """Make a device the current one for a while."""
        return torch.cuda.device(index)

    def stream(self, index: int) -> int:
        """Return the handle of a device's current stream."""
        return current_raw_stream(index)

    def is_capturing(self) -> bool:
        """Say whether the current stream is being captured into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()


class Library:
    """The functions of ``nvmath.bindings.cusparseLt``; sizes are in elements, addresses and handles are ints.

    Args:
        binding: Stands in for ``nvmath.bindings.cusparseLt``, which is otherwise imported at the first call.

    Raises:
        ImportError: At the first call, if nvmath is not installed; the message holds the command that installs it.
    """

    def __init__(self, binding: Any = None) -> None:
        if binding is not None:
            self.binding = binding
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._alpha, self._beta = ctypes.addressof(self._one), ctypes.addressof(self._zero)

    @cached_property
    def binding(self) -> Any:
        """The module with the functions."""
        return require("nvmath.bindings.cusparseLt", "cuda", "the cuSPARSELt backend")

    def version(self) -> str:
        """Return the version, such as ``"0.8.1"``."""
        return ".".join(str(self.binding.get_property(part)) for part in _VERSION_PARTS)

    def init(self) -> int:
        """Make a handle for the current device."""
        binding = self.binding
        try:
            return int(binding.init())
        except Exception as error:
            raise RuntimeError(
                f"cuSPARSELt cannot start ({error}): it needs an NVIDIA driver, a GPU of compute capability 8.0 or "
                "newer and libcusparseLt, which comes with the CUDA builds of PyTorch."
            ) from error

    def destroy(self, handle: int) -> None:
        """Give a handle back."""
        self.binding.destroy(handle)

    def sparse_matrix(self, handle: int, rows: int, columns: int, leading: int, dtype: torch.dtype) -> int:
        """Describe a row-major 2:4 matrix."""
        sparsity = int(self.binding.Sparsity.SPARSITY_50_PERCENT)
        value_type, order = DATA_TYPES[dtype], ORDERS["rows"]
        return int(
            self.binding.structured_descriptor_init(
                handle, rows, columns, leading, ALIGNMENT, value_type, order, sparsity
            )
        )

    def dense_matrix(self, handle: int, rows: int, columns: int, leading: int, dtype: torch.dtype, order: Order) -> int:
        """Describe a dense matrix."""
        value_type = DATA_TYPES[dtype]
        return int(
            self.binding.dense_descriptor_init(handle, rows, columns, leading, ALIGNMENT, value_type, ORDERS[order])
        )

    def destroy_matrix(self, matrix: int) -> None:
        """Destroy the description of a matrix."""
        self.binding.mat_descriptor_destroy(matrix)

    def product(self, handle: int, sparse: int, dense: int, output: int) -> int:
        """Describe ``output = sparse·dense``."""
        compute = int(self.binding.ComputeType.COMPUTE_32F)
        return int(
            self.binding.matmul_descriptor_init(
                handle, _NON_TRANSPOSE, _NON_TRANSPOSE, sparse, dense, output, output, compute
            )
        )

    def destroy_product(self, product: int) -> None:
        """Destroy the description of a product."""
        self.binding.matmul_descriptor_destroy(product)

    def set_bias(self, handle: int, product: int, address: int) -> _Bytes:
        """Add a vector with one value per row of the output; return what must outlive the product."""
        return self._set_product(handle, product, "BIAS_POINTER", address)

    def selection(self, handle: int, product: int) -> int:
        """Make the choice of an algorithm; the library's own until :meth:`set_algorithm`."""
        return int(self.binding.matmul_alg_selection_init(handle, product, int(self.binding.MatmulAlg.DEFAULT)))

    def destroy_selection(self, selection: int) -> None:
        """Destroy the choice of an algorithm."""
        self.binding.matmul_alg_selection_destroy(selection)

    def set_algorithm(
        self, handle: int, selection: int, name: Literal["CONFIG_ID", "SPLIT_K", "SPLIT_K_MODE"], value: int
    ) -> _Bytes:
        """Choose an algorithm; return what must outlive the selection."""
        binding = self.binding
        attribute = int(binding.MatmulAlgAttribute[name])
        data = _as_bytes(binding.get_matmul_alg_attribute_dtype(attribute), value)
        binding.matmul_alg_set_attribute(handle, selection, attribute, ctypes.addressof(data), len(data))
        return data

    def algorithm_count(self, handle: int, selection: int) -> int:
        """Return how many values ``CONFIG_ID`` may have."""
        binding = self.binding
        attribute = int(binding.MatmulAlgAttribute.CONFIG_MAX_ID)
        data = _as_bytes(binding.get_matmul_alg_attribute_dtype(attribute), 0)
        binding.matmul_alg_get_attribute(handle, selection, attribute, ctypes.addressof(data), len(data))
        return int.from_bytes(bytes(data), sys.byteorder, signed=True)

    def plan(self, handle: int, product: int, selection: int) -> int:
        """Make the plan of a product."""
        return int(self.binding.matmul_plan_init(handle, product, selection))

    def destroy_plan(self, plan: int) -> None:
        """Destroy a plan."""
        self.binding.matmul_plan_destroy(plan)

    def workspace_size(self, handle: int, plan: int) -> int:
        """Return how many bytes of device memory the product of a plan needs."""
        return int(self.binding.matmul_get_workspace(handle, plan))

    def multiply(
        self, handle: int, plan: int, compressed: int, dense: int, output: int, workspace: int, streams: int
    ) -> None:
        """Launch a product; ``streams`` is the address of a host array with one stream handle."""
        try:
            self.binding.matmul(
                handle, plan, self._alpha, compressed, dense, self._beta, output, output, workspace, streams, 1
            )
        except Exception as error:
            raise RuntimeError(f"cuSPARSELt cannot launch a product: {error}.") from error

    def compressed_size(self, handle: int, sparse: int) -> tuple[int, int]:
        """Return the bytes of a compressed matrix, and of the buffer that compressing needs."""
        size, buffer = self.binding.sp_mma_compressed_size2(handle, sparse)
        return int(size), int(buffer)

    def compress(self, handle: int, sparse: int, dense: int, compressed: int, buffer: int, stream: int) -> None:
        """Launch compression of a matrix that is 2:4 along its rows."""
        try:
            self.binding.sp_mma_compress2(handle, sparse, 1, _NON_TRANSPOSE, dense, compressed, buffer, stream)
        except Exception as error:
            raise RuntimeError(f"cuSPARSELt cannot compress a matrix: {error}.") from error

    def _set_product(self, handle: int, product: int, name: str, value: int) -> _Bytes:
        binding = self.binding
        attribute = int(binding.MatmulDescAttribute[name])
        data = _as_bytes(binding.get_matmul_desc_attribute_dtype(attribute), value)
        binding.matmul_desc_set_attribute(handle, product, attribute, ctypes.addressof(data), len(data))
        return data


def _as_bytes(dtype: Callable[[int], Any], value: int) -> _Bytes:
    # dtype is a NumPy type: the library reads and writes its machine representation
    data = dtype(value).tobytes()
    return (ctypes.c_char * len(data)).from_buffer_copy(data)
