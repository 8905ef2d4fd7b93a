"""``Session``: products with compressed 2:4 matrices by one thread on one device: a handle, plans, a workspace."""

import ctypes
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .library import ALIGNMENT, Devices, Library, Order
from .plans import (
    Algorithm,
    Closable,
    Matrix,
    Plan,
    PlanKey,
    build_plan,
    check_sparse,
    count_algorithms,
    describe_matrix,
    misaligned,
    plan_key,
)


@dataclass(slots=True)
class Lane:
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
    """A handle and its plans, on one device and for one thread at a time; ``CuSparseLt`` gives it out."""

    def __init__(self, library: Library, devices: Devices, index: int, lanes: dict[int, Lane], capacity: int) -> None:
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
        output: Order,
        algorithm: Algorithm,
    ) -> Tensor:
        """See :meth:`CuSparseLt.multiply`; the device is the current one."""
        dtype, devices = dense.dtype, self._devices
        matrix_address, dense_address = compressed.data_ptr(), dense.data_ptr()
        addresses, bias_address = matrix_address | dense_address, 0
        fits = compressed.dtype is dtype and compressed.is_contiguous() and devices.index(compressed) == self.index
        if bias is not None:
            addresses |= (bias_address := bias.data_ptr())
            alike = bias.dtype is dtype and bias.shape == shape[:1] and bias.stride(0) == 1
            fits = fits and alike and devices.index(bias) == self.index
        if addresses % ALIGNMENT or not fits:
            raise ValueError(_complaint(compressed, shape, dense, bias))
        # strides and sizes as they come: a cached call builds no PlanKey
        token = (shape, dense.shape, dense.stride(), dtype, bias_address, output, algorithm)
        plan = self._plans.get(token)
        if plan is None:
            key = plan_key(shape, dense, bias_address, output, algorithm)
            plan = self._plans.add(token, build_plan(self._library, self.handle, key))
        if compressed.numel() != plan.elements:
            raise ValueError(_wrong_size(compressed, shape, plan.elements))
        result, lane = dense.new_empty_strided(plan.size, plan.stride), self._lane()
        workspace = self._workspace(lane, plan.workspace, dense)
        space = 0 if workspace is None else workspace.data_ptr()
        launched = (plan.plan, matrix_address, dense_address, result.data_ptr(), space, lane.address)
        self._library.multiply(self.handle, *launched)
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

    def _lane(self) -> Lane:
        stream = self._devices.stream(self.index)
        lane = self._lanes.get(stream)
        if lane is None:
            streams = (ctypes.c_void_p * 1)(stream)
            lane = self._lanes.setdefault(stream, Lane(streams, ctypes.addressof(streams)))
        return lane

    def _workspace(self, lane: Lane, size: int, like: Tensor) -> Tensor | None:
        if not size:
            return None
        if self._devices.is_capturing():
            return like.new_empty(size, dtype=torch.uint8)
        workspace = lane.workspace
        if workspace is None or workspace.numel() < size:
            # the old one goes back to its stream's pool, where work comes after the products that still use it
            lane.workspace = workspace = like.new_empty(size, dtype=torch.uint8)
        return workspace


def _complaint(compressed: Tensor, shape: tuple[int, int], dense: Tensor, bias: Tensor | None) -> str:
    """Return the sentence about the first operand of a product that does not fit."""
    dtype = dense.dtype
    if bias is not None and (bias.dtype is not dtype or bias.shape != shape[:1] or bias.stride(0) != 1):
        return (
            f"bias is {bias.dtype} {tuple(bias.shape)} with strides {bias.stride()}: it must be {dtype} "
            f"{tuple(shape[:1])} and contiguous; cast or copy it."
        )
    tensors = {"compressed": compressed, "dense": dense, "bias": bias}
    if any(tensor is not None and tensor.data_ptr() % ALIGNMENT for tensor in tensors.values()):
        return misaligned(**tensors)
    if compressed.dtype is not dtype or not compressed.is_contiguous():
        return (
            f"compressed is {compressed.dtype} with strides {compressed.stride()}: it must be {dtype}, as dense "
            "is, and contiguous, as compress(...) returns it; compress the matrix again."
        )
    return (
        f"compressed is on {compressed.device}, dense on {dense.device} and bias on "
        f"{None if bias is None else bias.device}: all must be on one device; move them there."
    )


def _wrong_size(compressed: Tensor, shape: tuple[int, int], elements: int) -> str:
    return (
        f"compressed has {compressed.numel()} elements: a matrix {tuple(shape)} has {elements} here; "
        "give the shape of the matrix that compress(...) was called with."
    )
