"""``CuSparseLt``: products from any thread, each by a session of its thread's, out of a pool that outlives threads.

Nothing here waits for a device, and a product whose plan is cached makes one library call. It can be captured into a
CUDA graph if the same call ran once before, so that its plan exists. Evicting the plan of a captured product is safe:
plans are host memory, and a launch copies what it needs. A captured product takes its workspace from the graph's pool.
"""

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .library import CudaDevices, Devices, Library, Order
from .plans import DEFAULT_ALGORITHM, Algorithm, PlanKey, check_shape, plan_key
from .session import Lane, Session


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
        output: Order = "columns",
        algorithm: Algorithm = DEFAULT_ALGORITHM,
    ) -> Tensor:
        """Return ``A·B + bias``, summed in float32.

        The product with rows ``X [T, C]``, ``Y = X·Aᵀ + bias``, is ``multiply(a, (R, C), X.t(), bias=bias).t()``,
        contiguous ``[T, R]``; with ``output="rows"`` and no ``.t()`` it is ``Yᵀ [R, T]``.

        Args:
            compressed: A, as :meth:`compress` returns it; float16 or bfloat16.
            shape: ``(R, C)`` of A, multiples of 16.
            dense: B ``[C, N]`` of A's dtype, N a multiple of 8, rows or columns contiguous and multiples of 8 apart.
            bias: ``[R]`` of A's dtype or None. Its address is part of the plan: one that moves at every call needs a
                plan for every call.
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
                return session.multiply(compressed, shape, dense, bias, output, algorithm)
        return session.multiply(compressed, shape, dense, bias, output, algorithm)

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
        return plan_key(shape, dense, 0 if bias is None else bias.data_ptr(), output, algorithm)

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
        self._lanes: defaultdict[int, dict[int, Lane]] = defaultdict(dict)
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
