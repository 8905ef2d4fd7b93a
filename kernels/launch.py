"""Launching one kernel over many tensors: groups of equal layout, and their places relative to the first."""

import ctypes
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce
from itertools import chain
from operator import attrgetter, itemgetter, or_
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements; lets the compiler use the widest loads
PLANS = 32  # of one operator
ADDRESSES = 8  # sets of addresses that a column of a plan is met with, as an allocator takes turns

Settings = TypeVar("Settings")
Made = TypeVar("Made")
_DTYPE, _DEVICE = attrgetter("dtype"), attrgetter("device")


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


def layout_of(*columns: Sequence[Tensor]) -> Hashable:
    """Return all that a plan of launches is made from but the addresses: sizes, strides, dtypes and devices.

    Example:
        >>> layout_of([torch.zeros(4)]) == layout_of([torch.ones(4)]) != layout_of([torch.zeros(4, dtype=torch.int64)])
        True
    """
    every = [*chain.from_iterable(columns)]
    return (
        *map(len, columns), *map(Tensor.size, every), *map(Tensor.stride, every), *map(_DTYPE, every),
        *map(_DEVICE, every),
    )  # fmt: skip


def kernels_now(kernels: Mapping[str, Made], *columns: Sequence[Tensor]) -> Made | None:
    """Return what runs on tensors at once, by their type of device; None where the dispatcher has to be asked.

    It has to while something is compiled, under dispatch modes, for tensors of classes of their own, and for none.

    Example:
        >>> kernels_now({"cpu": "here"}, [torch.zeros(1)])
        'here'
        >>> kernels_now({"cpu": "here"}, []) is None
        True
    """
    last = columns[-1]
    if not last or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not are_plain(*columns):
        return None
    return kernels.get(last[0].device.type)


def are_plain(*columns: Sequence[Tensor]) -> bool:
    """Say whether all are tensors of no class of their own, whose operators something else might run.

    Example:
        >>> are_plain([torch.zeros(1)])
        True
    """
    return {*map(type, chain.from_iterable(columns))} <= {Tensor, nn.Parameter}


class Group(Generic[Settings]):
    """Tensors of equal layout, which share a launch.

    Args:
        positions: Theirs in every column.
        sizes: Bytes of what the kernel's pointers point to, one for each column.
        settings: What the launch is told beside addresses.
    """

    def __init__(self, positions: Sequence[int], sizes: Sequence[int], settings: Settings) -> None:
        self.positions, self.sizes, self.settings = tuple(positions), tuple(sizes), settings
        self.first = self.positions[0]
        self._pick: Callable[[Sequence[Any]], Any] = itemgetter(*self.positions)

    def pick(self, entries: Sequence[Made]) -> tuple[Made, ...]:
        """Return the group's entries of a column."""
        found = self._pick(entries)
        return found if len(self.positions) > 1 else (found,)

    def offsets(self, column: int, addresses: Sequence[int]) -> tuple[tuple[int, ...], bool]:
        """Return where the group's tensors begin, in elements from the first, and whether that is aligned."""
        own, size = self.pick(addresses), self.sizes[column]
        first = own[0]
        distances = [address - first for address in own]
        aligned = not first % 16 and not reduce(or_, distances) % (ALIGNMENT * size)  # sizes are powers of two
        return tuple([distance // size for distance in distances]), aligned


class Plan(Generic[Settings]):
    """The launches of columns of tensors: their groups, and where the tensors of each lie.

    It holds none of those tensors and is made of layouts alone: every use gives the addresses, so nothing in it can be
    out of date for tensors of these layouts.

    Args:
        groups: With one size for each column.

    Example:
        >>> base = torch.zeros(40)
        >>> plan = Plan([Group([0, 1], [4], None)])
        >>> [(offsets[0].tolist(), aligned) for _, offsets, aligned in plan.placed([[base, base[16:]]])]
        [([0, 16], (True,))]
    """

    def __init__(self, groups: Sequence[Group[Settings]]) -> None:
        self.groups = list(groups)
        self._met: dict[Hashable, tuple[Sequence[Tensor], tuple[bool, ...]]] = {}

    def placed(
        self, columns: Sequence[Sequence[Tensor]], known: Hashable = None, moving: int = 0
    ) -> Iterator[tuple[Group[Settings], tuple[Tensor, ...], tuple[bool, ...]]]:
        """Return the groups, each with a table of the offsets of every column, and whether every column is aligned.

        Args:
            columns: The tensors.
            known: What tells the addresses in all columns but the first few: where it was seen before, they are not
                asked for again. None to ask.
            moving: How many those few are.
        """
        where = self._streams(columns[0])
        tables: list[Sequence[Tensor]] = []
        aligned: list[tuple[bool, ...]] = []
        for number, column in enumerate(columns):
            if number and column is columns[number - 1]:
                tables.append(tables[-1])
                aligned.append(aligned[-1])
                continue
            settled = known is not None and number >= moving
            addresses = () if settled else tuple(map(Tensor.data_ptr, column))
            key = (number, known if settled else addresses, where)
            found = None if where is None else self._met.get(key)
            if found is None:
                addresses = addresses or tuple(map(Tensor.data_ptr, column))
                offsets, whether = zip(*[group.offsets(number, addresses) for group in self.groups], strict=True)
                found = self._tables(offsets, column), whether
                self._remember(key, found, ADDRESSES * len(columns))
            tables.append(found[0])
            aligned.append(found[1])
        return zip(self.groups, zip(*tables, strict=True), zip(*aligned, strict=True), strict=True)

    def numbered(self, numbers: Sequence[int], column: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return numbers, one for each tensor of a column, as a table for each group."""
        where = self._streams(column)
        key = ("numbers", tuple(numbers), where)
        found = None if where is None else self._met.get(key)
        if found is None:
            found = self._tables([group.pick(numbers) for group in self.groups], column), ()
            self._remember(key, found, ADDRESSES)
        return found[0]

    def _tables(self, numbers: Sequence[tuple[int, ...]], column: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return numbers of every group as a table on its device, that of a column's tensors."""
        devices = [column[group.first].device for group in self.groups]
        if len({*devices}) == 1:
            return tables(tuple(numbers), devices[0])
        return [table(own, device) for own, device in zip(numbers, devices, strict=True)]

    def _streams(self, column: Sequence[Tensor]) -> tuple[int, ...] | None:
        """Return the streams that the groups are launched on, whose tables are kept; None where none is."""
        if not column[self.groups[0].first].is_cuda:
            return ()
        if torch.cuda.is_current_stream_capturing():
            return None  # these are the graph's own
        devices = dict.fromkeys(column[group.first].device for group in self.groups)
        return tuple([torch.cuda.current_stream(device).cuda_stream for device in devices])

    def _remember(
        self, key: tuple[Hashable, ...], found: tuple[Sequence[Tensor], tuple[bool, ...]], limit: int
    ) -> None:
        if key[-1] is not None:
            _keep(self._met, key, found, limit)


class Plans(Generic[Made]):
    """Plans by what they were made from: the last few.

    Example:
        >>> plans: Plans[int] = Plans()
        >>> plans.of((1, 2), lambda: 3), plans.of((1, 2), lambda: 4)
        (3, 3)
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Made] = {}

    def of(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return the plan of a key, made if there is none; what ``make`` raises is raised, and nothing is kept."""
        plan = self._kept.get(key)
        if plan is None:
            plan = make()
            _keep(self._kept, key, plan, PLANS)
        return plan


def _keep(kept: dict[Any, Any], key: Hashable, value: object, limit: int) -> None:
    while len(kept) >= limit:
        kept.pop(next(iter(kept)), None)  # the oldest
    kept[key] = value


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

    The numbers lie in pinned memory, as a copy from pageable memory would wait for the device. A table is kept for its
    stream, in whose order it is written, read and freed. One that is made while a CUDA graph is captured is the graph's
    own, in its memory and written again by every replay from the arguments of a kernel, so that nothing else can free
    what it reads.

    Example:
        >>> table((0, 3), torch.device("cpu")).tolist()
        [0, 3]
    """
    return tables((numbers,), device)[0]


def tables(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return several tables, as :func:`table` makes them, written together.

    Example:
        >>> [one.tolist() for one in tables(((0, 3), (5,)), torch.device("cpu"))]
        [[0, 3], [5]]
    """
    if device.type != "cuda":
        return _kept_tables(numbers, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _written(numbers, device, captured=True)
    return _kept_tables(numbers, device, torch.cuda.current_stream(device).cuda_stream)


@lru_cache(maxsize=1024)
def _kept_tables(numbers: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> tuple[Tensor, ...]:
    return _written(numbers, device, captured=device.type not in ("cpu", "cuda"))


def _written(numbers: tuple[tuple[int, ...], ...], device: torch.device, captured: bool) -> tuple[Tensor, ...]:
    padded = [(*own, 0) if len(own) % 2 else own for own in numbers]  # tables begin at multiples of 16 bytes
    flat = array("q", [*chain.from_iterable(padded)])
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        if not flat:
            made = torch.empty(0, dtype=torch.int64, device=device)
        elif captured:
            made = torch.zeros(len(flat), dtype=torch.int64, device=device)
            torch._foreach_add_(made.unbind(), flat.tolist())
        elif device.type == "cuda":
            host = torch.empty(len(flat), dtype=torch.int64, pin_memory=True)
            ctypes.memmove(host.data_ptr(), flat.buffer_info()[0], 8 * len(flat))
            # the host's memory is used again when the stream has read it
            made = torch.empty(len(flat), dtype=torch.int64, device=device).copy_(host, non_blocking=True)
        else:
            made = torch.frombuffer(flat, dtype=torch.int64)
        parts = made.split_with_sizes([*map(len, padded)])
        return tuple(
            [part if part.numel() == len(own) else part[: len(own)] for part, own in zip(parts, numbers, strict=True)]
        )


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
