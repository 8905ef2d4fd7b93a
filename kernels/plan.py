"""Plans of launches over many tensors: groups of equal layout, and tables of their places relative to the first."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import reduce
from itertools import chain
from operator import attrgetter, itemgetter, or_
from typing import Any, Generic, TypeVar

from torch import Tensor

from .launch import Known, stream_of
from .pointer_tables import written_tables

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
        >>> import torch
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


def strides_of(tensors: Sequence[Tensor]) -> Hashable:
    """Return what tells the strides of tensors of known sizes.

    Example:
        >>> import torch
        >>> strides_of([torch.zeros(4, 8)]) == strides_of([torch.ones(4, 8)]) != strides_of([torch.zeros(8, 4).t()])
        True
    """
    return True if all(map(Tensor.is_contiguous, tensors)) else tuple(map(Tensor.stride, tensors))


def layout_of(*columns: Sequence[Tensor]) -> Hashable:
    """Return all that a plan of launches is made from but the addresses: sizes, strides, dtypes and devices.

    Example:
        >>> import torch
        >>> layout_of([torch.zeros(4)]) == layout_of([torch.ones(4)]) != layout_of([torch.zeros(4, dtype=torch.int64)])
        True
    """
    every = [*chain.from_iterable(columns)]
    return (
        *map(len, columns),
        *map(Tensor.size, every),
        *map(Tensor.stride, every),
        *map(_DTYPE, every),
        *map(_DEVICE, every),
    )


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


class Plan(Generic[Settings]):
    """The launches of columns of tensors: their groups, and where the tensors of each lie.

    It holds none of those tensors and is made of layouts alone: every use gives the addresses, so nothing in it can be
    out of date for tensors of these layouts.

    Args:
        groups: With one size for each column.

    Example:
        >>> import torch
        >>> base = torch.zeros(40)
        >>> plan = Plan([Group([0, 1], [4], None)])
        >>> [(offsets[0].tolist(), aligned) for _, offsets, aligned in plan.placed([[base, base[16:]]])]
        [([0, 16], (True,))]
    """

    def __init__(self, groups: Sequence[Group[Settings]]) -> None:
        self.groups = list(groups)
        self._met: dict[Hashable, tuple[Sequence[Tensor], tuple[bool, ...]]] = {}

    def placed(
        self, columns: Sequence[Sequence[Tensor]], known: Known | None = None
    ) -> Iterator[tuple[Group[Settings], tuple[Tensor, ...], tuple[bool, ...]]]:
        """Return the groups, each with a table of the offsets of every column, and whether every column is aligned.

        Args:
            columns: The tensors.
            known: Of these columns; None to ask where all tensors are.
        """
        where = self._streams(columns[0])
        found: list[Sequence[Tensor]] = []
        aligned: list[tuple[bool, ...]] = []
        for number, column in enumerate(columns):
            if number and column is columns[number - 1]:
                found.append(found[-1])
                aligned.append(aligned[-1])
                continue
            addresses: tuple[int, ...] = ()
            if known is None or number < known.moving:
                addresses = tuple(map(Tensor.data_ptr, column))
            key = (number, addresses or (known and known.places), where)
            met = None if where is None else self._met.get(key)
            if met is None:
                met = self._offsets(number, addresses or tuple(map(Tensor.data_ptr, column)), column)
                self._remember(key, met, ADDRESSES * len(columns))
            found.append(met[0])
            aligned.append(met[1])
        return zip(self.groups, zip(*found, strict=True), zip(*aligned, strict=True), strict=True)

    def numbered(self, numbers: Sequence[int], column: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return numbers, one for each tensor of a column, as a table for each group."""
        where = self._streams(column)
        key = ("numbers", tuple(numbers), where)
        found = None if where is None else self._met.get(key)
        if found is None:
            found = self._tables([group.pick(numbers) for group in self.groups], column), ()
            self._remember(key, found, ADDRESSES)
        return found[0]

    def _offsets(
        self, number: int, addresses: Sequence[int], column: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], tuple[bool, ...]]:
        """Return where tensors begin, in elements from their group's first: a table for each group, and its alignment.

        A gradient may lie elsewhere in every step, and an operator of torch takes longer than a loop over a model's.
        """
        found: list[list[int]] = []
        aligned = []
        for group in self.groups:
            size, own = group.sizes[number], group.pick(addresses)
            first = own[0]
            distances = [address - first for address in own]
            aligned.append(not first % 16 and not reduce(or_, distances) % (ALIGNMENT * size))  # powers of two
            found.append([distance // size for distance in distances])
        return self._tables(found, column), tuple(aligned)

    def _tables(self, numbers: Sequence[Sequence[int]], column: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return numbers of every group as a table on its device, that of a column's tensors."""
        devices = [column[group.first].device for group in self.groups]
        if len({*devices}) == 1:
            return written_tables(numbers, devices[0])
        return [written_tables([own], device)[0] for own, device in zip(numbers, devices, strict=True)]

    def _streams(self, column: Sequence[Tensor]) -> tuple[int, ...] | None:
        """Return the streams that the groups are launched on, whose tables are kept; None where none is."""
        if not column[self.groups[0].first].is_cuda:
            return ()
        streams = [stream_of(column[group.first]) for group in self.groups]
        known = tuple([stream for stream in streams if stream is not None])
        return known if len(known) == len(streams) else None

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


def are_aligned(*columns: Sequence[Tensor]) -> bool:
    """Say whether every tensor and its offset from the first of its column is a multiple of ``ALIGNMENT`` elements."""
    for column in columns:
        step, first = ALIGNMENT * column[0].element_size(), column[0].data_ptr()
        if first % 16 or any((tensor.data_ptr() - first) % step for tensor in column):
            return False
    return True
