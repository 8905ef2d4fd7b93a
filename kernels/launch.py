"""Launching kernels: on which device and stream, at once or through the dispatcher, and again without asking."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .torch_internals import count_dispatch_modes

Made = TypeVar("Made")


class Launch(NamedTuple):
    """One launch of a kernel, with all that it is told.

    Args:
        kernel: Of Triton.
        grid: Of its programs.
        arguments: A tensor on the device first.
        options: Told by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Launch it, on the current stream of the first tensor's device."""
        with on_device_of(self.arguments[0]):
            self.kernel[self.grid](*self.arguments, **self.options)


class Known(NamedTuple):
    """What a caller tells of columns of tensors that it has listed, so that nothing asks every tensor again.

    The tensors that it is about, and those of the moving columns, are of no class of their own.

    Args:
        layouts: Equal where sizes, strides, dtypes and devices are.
        places: Equal where addresses are too.
        moving: Columns, the first of a call, that it is not about.
        kept: Where the launches of these tensors are kept with their arguments, which are those tensors, by what tells
            them; for the time that the caller holds the tensors. None to keep none.
    """

    layouts: Hashable
    places: Hashable
    moving: int = 0
    kept: dict[Hashable, list[Launch]] | None = None

    def key(self, tensor: Tensor) -> Hashable:
        """Return by what launches on the tensor's device are kept; None where none are."""
        if self.moving or self.kept is None:
            return None
        stream = stream_of(tensor)
        return None if stream is None else (self.places, stream)


def launch(launches: Iterable[Launch], known: Known | None, tensor: Tensor) -> None:
    """Launch kernels, and keep them for :func:`relaunched` where all that they are told is known.

    Args:
        launches: On one device.
        known: Of all tensors of these launches, if they are.
        tensor: On that device.

    Example:
        >>> launch([], None, torch.zeros(1))
    """
    key = None if known is None else known.key(tensor)
    if known is not None and known.kept is not None and key is not None:
        launches = [*launches]
        known.kept.clear()
        known.kept[key] = launches
    for one in launches:
        one.run()


def relaunched(known: Known | None, tensor: Tensor) -> bool:
    """Launch again what was launched of known tensors on the current stream; return whether there was anything.

    Args:
        known: As in :func:`launch`.
        tensor: See there.

    Example:
        >>> relaunched(None, torch.zeros(1))
        False
    """
    if known is None or known.moving or not known.kept:
        return False
    launches = known.kept.get(known.key(tensor))
    for one in launches or ():
        one.run()
    return launches is not None


def stream_of(tensor: Tensor) -> int | None:
    """Return the stream that kernels of a tensor are launched on; None for a graph's, whose tables are its own."""
    if not tensor.is_cuda:
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(tensor.device).cuda_stream


def kernels_now(kernels: Mapping[str, Made], known: Known | None, *columns: Sequence[Tensor]) -> Made | None:
    """Return what runs on tensors at once, by their type of device; None where the dispatcher has to be asked.

    It has to while something is compiled, under dispatch modes, for tensors of classes of their own, and for none.

    Example:
        >>> kernels_now({"cpu": "here"}, None, [torch.zeros(1)])
        'here'
        >>> kernels_now({"cpu": "here"}, None, []) is None
        True
    """
    last = columns[-1]
    if not last or torch.compiler.is_compiling() or count_dispatch_modes():
        return None
    if not are_plain(*(columns if known is None else columns[: known.moving])):
        return None
    return kernels.get(last[0].device.type)


def are_plain(*columns: Sequence[Tensor]) -> bool:
    """Say whether all are tensors of no class of their own, whose operators something else might run.

    Example:
        >>> are_plain([torch.zeros(1)])
        True
    """
    return {*map(type, chain.from_iterable(columns))} <= {Tensor, nn.Parameter}


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
