"""Products with a compressed 2:4 matrix: a handle and plans per thread and device, a workspace per stream.

Nothing here waits for a device, and a product whose plan is cached makes one library call. It can be captured into a
CUDA graph if the same call ran once before, so that its plan exists. Evicting the plan of a captured product is safe:
plans are host memory, and a launch copies what it needs. A captured product takes its workspace from the graph's pool.
"""

import ctypes
import threading
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .library import ALIGNMENT, CudaDevices, Devices, Epilogue, Library, Order
from .plans import (
    DEFAULT_ALGORITHM,
    Algorithm,
    Closable,
    Matrix,
    Plan,
    PlanKey,
    build_plan,
    check_shape,
    check_sparse,
    count_algorithms,
    describe_matrix,
    misaligned,
    plan_key,
)


@dataclass(slots=True)
class _Lane:
    """What the products of one stream share; they run one after the other."""

    streams: "ctypes.Array[ctypes.c_void_p]"
    address: int
    workspace: Tensor | None = None


Item = TypeVar("Item", bound=Closable)


class _Recent(Generic[Item]):
    """The items that were used last; the others are closed."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._items = capacity, OrderedDict[object, Item]()

    def get(self, token: object) -> Item | None:
        item = self._items.get(token)
        if item is not None:
            self._items.move_to_end(token)
        return item

    def add(self, token: object, item: Item) -> Item:
        self._items[token] = item
        while len(self._items) > self._capacity:
            self._items.popitem(last=False)[1].close()
        return item

    def close(self) -> None:
        while self._items:
            self._items.popitem(last=False)[1].close()


class Session:
    """A handle and its plans, on one device and for one thread at a time; :class:`CuSparseLt` gives it out."""

    def __init__(self, library: Library, devices: Devices, index: int, lanes: dict[int, _Lane], capacity: int) -> None:
        self.index, self._library, self._devices, self._lanes = index, library, devices, lanes
        self._handle: int | None = None
        self._plans, self._matrices = _Recent[Plan](capacity), _Recent[Matrix](capacity)

    @property
    def handle(self) -> int:
        """The library's handle, made at the first use."""
        if self._handle is None:
            self._handle = self._library.init()
        return self._handle

    def multiply(
        self,
        compressed: Tensor,
        shape: tuple[int, int],
        dense: Tensor,
        bias: Tensor | None,
        epilogue: Epilogue | None,
        output: Order,
        algorithm: Algorithm,
    ) -> Tensor:
        """See :meth:`CuSparseLt.multiply`; the device is the current one."""
        dtype, devices = dense.dtype, self._devices
        matrix_address, dense_address = compressed.data_ptr(), dense.data_ptr()
        addresses, bias_address = matrix_address | dense_address, 0
        if bias is not None:
            addresses |= (bias_address := bias.data_ptr())
            if bias.dtype is not dtype or bias.shape != shape[:1] or bias.stride(0) != 1:
                raise ValueError(
                    f"bias is {bias.dtype} {tuple(bias.shape)} with strides {bias.stride()}: it must be {dtype} "
                    f"{tuple(shape[:1])} and contiguous; cast or copy it."
                )
        if addresses % ALIGNMENT:
            raise ValueError(misaligned(compressed=compressed, dense=dense, bias=bias))
        if compressed.dtype is not dtype or not compressed.is_contiguous():
            raise ValueError(
                f"compressed is {compressed.dtype} with strides {compressed.stride()}: it must be {dtype}, as dense "
                "is, and contiguous, as compress(...) returns it; compress the matrix again."
            )
        if devices.index(compressed) != self.index or (bias is not None and devices.index(bias) != self.index):
            raise ValueError(
                f"compressed is on {compressed.device}, dense on {dense.device} and bias on "
                f"{None if bias is None else bias.device}: all must be on one device; move them there."
            )
        # strides and sizes as they come: a cached call builds no PlanKey
        token = (shape, dense.shape, dense.stride(), dtype, epilogue, bias_address, output, algorithm)
        plan = self._plans.get(token)
        if plan is None:
            key = plan_key(shape, dense, bias_address, epilogue, output, algorithm)
            plan = self._plans.add(token, build_plan(self._library, self.handle, key))
        if compressed.numel() != plan.elements:
            raise ValueError(
                f"compressed has {compressed.numel()} elements: a matrix {tuple(shape)} has {plan.elements} here; "
                "give the shape of the matrix that compress(...) was called with."
            )
        result = dense.new_empty_strided(plan.size, plan.stride)
        lane = self._lane()
        workspace = self._workspace(lane, plan.workspace, dense)
        self._library.multiply(
            self.handle,
            plan.plan,
            matrix_address,
            dense_address,
            result.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            lane.address,
        )
        return result

    def compress(self, dense: Tensor, out: Tensor | None) -> Tensor:
        """See :meth:`CuSparseLt.compress`; the device is the current one."""
        rows, columns, leading = check_sparse(dense)
        if dense.data_ptr() % ALIGNMENT:
            raise ValueError(misaligned(dense=dense))
        matrix = self.matrix(rows, columns, leading, dense.dtype)
        if out is None:
            out = dense.new_zeros(matrix.elements)  # zeros: the library leaves padding as it is
        elif (
            (out.dtype, out.shape) != (dense.dtype, (matrix.elements,))
            or not out.is_contiguous()
            or out.data_ptr() % ALIGNMENT
            or self._devices.index(out) != self.index
        ):
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device} at address {out.data_ptr():#x}: it must be "
                f"contiguous {dense.dtype} ({matrix.elements},) on {dense.device} at a multiple of {ALIGNMENT} bytes; "
                "give what compress(...) returned before."
            )
        lane = self._lane()
        buffer = self._workspace(lane, matrix.buffer, dense)
        self._library.compress(
            self.handle,
            matrix.sparse,
            dense.data_ptr(),
            out.data_ptr(),
            0 if buffer is None else buffer.data_ptr(),
            lane.streams[0] or 0,
        )
        return out

    def matrix(self, rows: int, columns: int, leading: int, dtype: torch.dtype) -> Matrix:
        """Return the cached description of a sparse matrix."""
        token = (rows, columns, leading, dtype)
        matrix = self._matrices.get(token)
        if matrix is None:
            matrix = self._matrices.add(token, describe_matrix(self._library, self.handle, token))
        return matrix

    def algorithm_count(self, key: PlanKey) -> int:
        """See :meth:`CuSparseLt.algorithm_count`."""
        return count_algorithms(self._library, self.handle, key)

    def close(self) -> None:
        """Destroy the plans and the handle."""
        self._plans.close()
        self._matrices.close()
        if self._handle is not None:
            self._library.destroy(self._handle)
            self._handle = None

    def _lane(self) -> _Lane:
        stream = self._devices.stream(self.index)
        lane = self._lanes.get(stream)
        if lane is None:
            streams = (ctypes.c_void_p * 1)(stream)
            lane = self._lanes.setdefault(stream, _Lane(streams, ctypes.addressof(streams)))
        return lane

    def _workspace(self, lane: _Lane, size: int, like: Tensor) -> Tensor | None:
        if not size:
            return None
        if self._devices.is_capturing():
            return like.new_empty(size, dtype=torch.uint8)
        workspace = lane.workspace
        if workspace is None or workspace.numel() < size:
            # the old one goes back to its stream's pool, where work comes after the products that still use it
            lane.workspace = workspace = like.new_empty(size, dtype=torch.uint8)
        return workspace


@dataclass(slots=True)
class _Held:
    """The sessions of a thread; when it ends they wait for another."""

    idle: defaultdict[int, deque[Session]]
    sessions: dict[int, Session] = field(default_factory=dict)

    def __del__(self) -> None:
        for index, session in self.sessions.items():
            self.idle[index].append(session)


class _Local(threading.local):
    def __init__(self, idle: defaultdict[int, deque[Session]]) -> None:
        self.held = _Held(idle)


class CuSparseLt:
    """Products with compressed 2:4 matrices, from any thread, on the current stream of the operands' device.

    Args:
        library: The calls of cuSPARSELt; by default those of nvmath, imported at the first use.
        devices: The CUDA runtime; by default PyTorch's.
        capacity: How many plans a thread keeps on a device.
    """

    def __init__(self, library: Library | None = None, devices: Devices | None = None, capacity: int = 1024) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}: it must be at least 1, because a product needs a plan.")
        self._library = Library() if library is None else library
        self._devices: Devices = CudaDevices() if devices is None else devices
        self._capacity = capacity
        self._start()

    def multiply(
        self,
        compressed: Tensor,
        shape: tuple[int, int],
        dense: Tensor,
        *,
        bias: Tensor | None = None,
        epilogue: Epilogue | None = None,
        output: Order = "columns",
        algorithm: Algorithm = DEFAULT_ALGORITHM,
    ) -> Tensor:
        """Return ``epilogue(A·B + bias)``, summed in float32.

        The product with rows ``X [T, C]``, ``Y = X·Aᵀ + bias``, is ``multiply(a, (R, C), X.t(), bias=bias).t()``,
        contiguous ``[T, R]``; with ``output="rows"`` and no ``.t()`` it is ``Yᵀ [R, T]``.

        Args:
            compressed: A, as :meth:`compress` returns it; float16 or bfloat16.
            shape: ``(R, C)`` of A, multiples of 16.
            dense: B ``[C, N]`` of A's dtype, N a multiple of 8, rows or columns contiguous and multiples of 8 apart.
            bias: ``[R]`` of A's dtype or None. Its address is part of the plan: one that moves at every call needs a
                plan for every call.
            epilogue: ``"relu"``, ``"gelu"`` or None.
            output: Whether the rows or the columns of the result are contiguous.
            algorithm: Which of the library's algorithms runs.

        Returns:
            ``[R, N]`` of A's dtype.

        Raises:
            ValueError: If an operand does not fit, before the library is called.
            RuntimeError: If cuSPARSELt cannot start or refuses the product.
            ImportError: If nvmath is not installed.
        """
        session, guard = self._session_of(dense)
        if guard:
            with self._devices.guard(session.index):
                return session.multiply(compressed, shape, dense, bias, epilogue, output, algorithm)
        return session.multiply(compressed, shape, dense, bias, epilogue, output, algorithm)

    def compress(self, dense: Tensor, out: Tensor | None = None) -> Tensor:
        """Compress a matrix with at most two values in every four along a row; others are not noticed.

        Args:
            dense: ``[R, C]``, float16 or bfloat16, multiples of 16, rows contiguous and multiples of 16 apart.
            out: A buffer that this method returned for the same shape, to be written again; its address stays.

        Returns:
            1-D buffer of ``compressed_size(R, C, dtype)`` elements of dense's dtype, in the library's format for
            this device.

        Raises:
            ValueError: If dense or out does not fit, before anything is changed.
            RuntimeError: If cuSPARSELt cannot start or refuses the matrix.
            ImportError: If nvmath is not installed.
        """
        session, guard = self._session_of(dense)
        if guard:
            with self._devices.guard(session.index):
                return session.compress(dense, out)
        return session.compress(dense, out)

    def compressed_size(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Return how many elements ``compress`` returns for ``[rows, columns]`` on the current device."""
        check_shape((rows, columns), dtype)
        return self.session(self._devices.current()).matrix(rows, columns, columns, dtype).elements

    def key(
        self,
        shape: tuple[int, int],
        dense: Tensor,
        *,
        bias: Tensor | None = None,
        epilogue: Epilogue | None = None,
        output: Order = "columns",
        algorithm: Algorithm = DEFAULT_ALGORITHM,
    ) -> PlanKey:
        """Return the key of the plan that ``multiply`` would use, without calling the library.

        Raises:
            ValueError: If an operand does not fit.

        Example:
            >>> key = CuSparseLt().key((32, 16), torch.zeros(8, 16).half().t())
            >>> key.n, key.dense_order, key.dense_leading, key.output_leading
            (8, 'columns', 16, 32)
        """
        return plan_key(shape, dense, 0 if bias is None else bias.data_ptr(), epilogue, output, algorithm)

    def algorithm_count(self, key: PlanKey) -> int:
        """Return how many values ``config_id`` may have for a product on the current device."""
        return self.session(self._devices.current()).algorithm_count(key)

    def version(self) -> str:
        """Return the library's version, such as ``"0.8.1"``."""
        return self._library.version()

    def session(self, index: int) -> Session:
        """Return this thread's session of a device."""
        sessions = self._local.held.sessions
        session = sessions.get(index)
        if session is None:
            try:
                session = self._idle[index].pop()
            except IndexError:
                session = Session(self._library, self._devices, index, self._lanes[index], self._capacity)
                self._sessions.append(session)
            sessions[index] = session
        return session

    def close(self) -> None:
        """Destroy every plan and handle of every thread; no other thread may be using them."""
        for session in self._sessions:
            with self._devices.guard(session.index):
                session.close()
        self._start()

    def _start(self) -> None:
        self._idle: defaultdict[int, deque[Session]] = defaultdict(deque)
        self._lanes: defaultdict[int, dict[int, _Lane]] = defaultdict(dict)
        self._sessions: list[Session] = []
        self._local = _Local(self._idle)

    def _session_of(self, dense: Tensor) -> tuple[Session, bool]:
        index = self._devices.index(dense)
        if index < 0:
            raise ValueError(f"dense is on {dense.device}: it must be on a CUDA device; move it there.")
        return self.session(index), index != self._devices.current()


_DEFAULT = CuSparseLt()


def default() -> CuSparseLt:
    """Return the one that the backend uses; tests put another into ``_DEFAULT``."""
    return _DEFAULT
