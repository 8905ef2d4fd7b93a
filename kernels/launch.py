"""Launching one kernel over many tensors: groups of equal layout, and their places relative to the first."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

ALIGNMENT = 16  # elements; lets the compiler use the widest loads


def groups_of_equal_layout(*columns: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions whose tensors have the same shapes, strides, dtypes and devices, column by column.

    Args:
        columns: Lists of equal length; entry i of each belongs together.

    Returns:
        Lists of positions, in the order in which a layout first appears.

    Example:
        >>> groups_of_equal_layout([torch.zeros(4), torch.zeros(8), torch.ones(4)])
        [[0, 2], [1]]
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, entry in enumerate(zip(*columns, strict=True)):
        layout: list[object] = []
        for tensor in entry:
            layout += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device())
        groups.setdefault(tuple(layout), []).append(position)
    return list(groups.values())


def members(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the first of several tensors of one dtype and device, and where each begins, counted from it.

    A kernel reaches all of them from one typed pointer. The table of offsets is kept, so that launches on the same
    memory write no other.

    Returns:
        The first tensor, and int64 ``[tensors]`` offsets in elements on its device.

    Example:
        >>> base = torch.zeros(10)
        >>> members([base, base[3:]])[1].tolist()
        [0, 3]
    """
    return tensors[0], table(tuple(_offsets(tensors)), tensors[0].device)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on the tensor's device.

    Example:
        >>> with on_device_of(torch.zeros(1)):
        ...     pass
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter.

    Example:
        >>> interpreted() in (True, False)
        True
    """
    from triton import knobs

    return bool(knobs.runtime.interpret)


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 ``[numbers]`` on a device, without waiting for it. Do not write to it.

    The numbers travel as arguments of a kernel, as a copy from pageable memory would wait for the device. A table is
    kept for its stream, in whose order it is written, read and freed. One that is made while a CUDA graph is captured
    is the graph's own, in its memory and written again by every replay, so that nothing else can free what it reads.

    Example:
        >>> table((0, 3), torch.device("cpu")).tolist()
        [0, 3]
    """
    if device.type != "cuda":
        return _kept_table(numbers, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _written(numbers, device)
    return _kept_table(numbers, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=1024)
def _kept_table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _written(numbers, device)


def _written(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        made = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        if numbers:
            torch._foreach_add_(made.unbind(), numbers)
    return made


def are_aligned(*columns: Sequence[Tensor]) -> bool:
    """Say whether every tensor and its offset from the first of its column is a multiple of ``ALIGNMENT`` elements."""
    for column in columns:
        step, first = ALIGNMENT * column[0].element_size(), column[0].data_ptr()
        if first % 16 or any((tensor.data_ptr() - first) % step for tensor in column):
            return False
    return True


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - first) // size for tensor in tensors]
