"""Tables of numbers on a device, such as the places of a launch's tensors, written without waiting for the device."""

import ctypes
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from .torch_internals import foreach_add_


def table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 ``[numbers]`` on a device, without waiting for it. Do not write to it.

    The numbers lie in pinned memory, as a copy from pageable memory would wait for the device. A table is kept for its
    stream, in whose order it is written, read and freed. One that is made while a CUDA graph is captured is the graph's
    own, in its memory and written again by every replay from the arguments of a kernel, so that nothing else can free
    what it reads.

    Example:
        >>> table((0, 3), torch.device("cpu")).tolist()
        [0, 3]
    """
    if device.type != "cuda":
        return _kept_table(numbers, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return written_tables([numbers], device)[0]
    return _kept_table(numbers, device, torch.cuda.current_stream(device).cuda_stream)


def written_tables(numbers: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Return several tables, as :func:`table` makes them, written together, and not kept.

    Example:
        >>> [one.tolist() for one in written_tables([(0, 3), (5,)], torch.device("cpu"))]
        [[0, 3], [5]]
    """
    flat, lengths = array("q"), []
    for own in numbers:
        flat.extend(own)
        if len(own) % 2:
            flat.append(0)  # tables begin at multiples of 16 bytes
        lengths.append(len(own) + len(own) % 2)
    parts = _on_device(flat, device).split_with_sizes(lengths)
    return tuple(
        [part if part.numel() == len(own) else part[: len(own)] for part, own in zip(parts, numbers, strict=True)]
    )


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
    first, size = tensors[0].data_ptr(), tensors[0].element_size()
    return tensors[0], table(tuple((tensor.data_ptr() - first) // size for tensor in tensors), tensors[0].device)


@lru_cache(maxsize=1024)
def _kept_table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return written_tables([numbers], device)[0]


def _on_device(numbers: "array[int]", device: torch.device) -> Tensor:
    # who is in inference mode now may not be later
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        count = len(numbers)
        if not count:
            return torch.empty(0, dtype=torch.int64, device=device)
        if device.type == "cpu":
            return torch.frombuffer(numbers, dtype=torch.int64)
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            made = torch.zeros(count, dtype=torch.int64, device=device)
            foreach_add_(made.unbind(), numbers.tolist())
            return made
        pinned = torch.empty(count, dtype=torch.int64, pin_memory=True)
        ctypes.memmove(pinned.data_ptr(), numbers.buffer_info()[0], 8 * count)
        # the host's memory is used again when the stream has read it
        return torch.empty(count, dtype=torch.int64, device=device).copy_(pinned, non_blocking=True)
