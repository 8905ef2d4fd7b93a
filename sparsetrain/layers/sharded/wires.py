"""Wires: in what form a weight's parts travel when FSDP2 gathers it, and what the products find afterwards.

Every form says in which phase of which method it can be used; only ``masked`` can always.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ...distributed.shards import local
from ...kernels.wire import numbers_of_codes, to_wire_
from ...matmul.wire_operands import WireOperands


class SpreadLayer(Protocol):
    """A masked layer whose weight is spread."""

    mask_codes: Tensor
    backward_codes: Tensor | None

    def sent_part(self, dtype: torch.dtype) -> Tensor:
        """Return what products see of the part that lies here, shaped like it; what is pruned is -0."""

    def seen_matrix(self) -> Tensor:
        """Return the matrix of the part that lies here whose kept entries products see."""


class Wire:
    """A form in which a layer's parts travel."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.memory: list[Tensor] = []
        """Of tensors beside the weight, which FSDP2 takes away with it, and gives back before it gathers again."""

    def send(self, layer: SpreadLayer, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return what is sent.

        Args:
            layer: Whose part it is.
            size: Of the largest part, which every process sends as much as.
            dtype: In which products see weights.
        """
        raise NotImplementedError(f"{type(self).__name__} needs send(layer, size, dtype).")

    def receive(self, layer: SpreadLayer, parts: Sequence[Tensor]) -> Tensor:
        """Take what was gathered, and return the tensor that stands for the whole weight.

        Args:
            layer: Whose weight it is.
            parts: What every process has sent, along rows; of a mesh of one process, FSDP2 gives the first alone.
        """
        raise NotImplementedError(f"{type(self).__name__} needs receive(layer, parts).")

    def settle(self, parameter: Tensor) -> None:
        """Act on the parameter that FSDP2 has made of what :meth:`receive` returned."""


class MaskedWire(Wire):
    """The part as products see it, in the weight's own shape; the mask can be read from the zeros."""

    name = "masked"

    def send(self, layer: SpreadLayer, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the part with -0 where it is pruned."""
        return (padded(layer.sent_part(dtype), size),)

    def receive(self, layer: SpreadLayer, parts: Sequence[Tensor]) -> Tensor:
        """Return the masked weight."""
        return parts[0]


class DoublePrunedWire(MaskedWire):
    """The same, and beside it the codes by which the input gradient's weight is pruned further."""

    name = "masked and codes"

    def __init__(self) -> None:
        super().__init__()
        self.codes: Tensor | None = None
        """The whole weight's backward codes, int16, while it is gathered."""

    def send(self, layer: SpreadLayer, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the part, and its backward codes as bytes."""
        codes = layer.backward_codes
        assert codes is not None
        room = padded(codes, (size[0] // 4, codes.shape[1]))
        return *super().send(layer, size, dtype), room.view(torch.uint8)  # collectives take no int16

    def receive(self, layer: SpreadLayer, parts: Sequence[Tensor]) -> Tensor:
        """Return the masked weight."""
        self.codes = parts[1].view(torch.int16) if len(parts) > 1 else layer.backward_codes
        return parts[0]


class PackedWire(Wire):
    """What is kept, and one byte a tile: 17/32 of the bytes of a 16-bit weight, and no dense weight anywhere.

    Args:
        shape: Of the matrix that is gathered, ``(O, I)``.
    """

    name = "packed"

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.values: Tensor | None = None
        """``[O, I/2]``, while it is gathered."""
        self.numbers: Tensor | None = None
        """uint8 ``[O/4, I/4]``, while it is gathered."""
        self.operands = WireOperands(self.memory)
        self._stand_in: Tensor | None = None

    def send(self, layer: SpreadLayer, size: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return kept values, and the numbers of the tiles' patterns."""
        matrix, (rows, columns) = layer.seen_matrix(), size
        values = matrix.new_empty(rows, columns // 2, dtype=dtype)
        numbers = matrix.new_empty(rows // 4, columns // 4, dtype=torch.uint8)
        to_wire_(matrix, layer.mask_codes, values, numbers)
        return values, numbers

    def receive(self, layer: SpreadLayer, parts: Sequence[Tensor]) -> Tensor:
        """Return a tensor of the weight's shape, which loses its memory as soon as FSDP2 has made a parameter of it."""
        rows = self.shape[0]
        numbers = parts[1] if len(parts) > 1 else numbers_of_codes(layer.mask_codes)
        self.values, self.numbers = parts[0][:rows], numbers[: rows // 4]
        self.operands.outdate()
        if self._stand_in is None:
            with torch.inference_mode(False):
                self._stand_in = torch.empty(self.shape, dtype=self.values.dtype, device=self.values.device)
        return self._stand_in

    def settle(self, parameter: Tensor) -> None:
        """Leave it one entry for all: it has the weight's shape, and whoever reads it finds no numbers."""
        part = local(parameter)
        part.data = part.new_full((), float("nan")).expand(part.shape)
        if self._stand_in is not None:
            self._stand_in.untyped_storage().resize_(0)


def padded(part: Tensor, size: Sequence[int]) -> Tensor:
    """Return a part with zeros up to a size, contiguous; itself if it has that size.

    Example:
        >>> padded(torch.ones(1, 2), (2, 2)).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    if list(part.shape) == list(size):
        return part.contiguous()
    room = part.new_zeros(tuple(size))
    room[tuple(slice(0, length) for length in part.shape)] = part
    return room


def part_size(part: Tensor, whole: Sequence[int], count: int) -> list[int]:
    """Return the size of the largest of ``count`` parts of a tensor.

    Args:
        part: One of them.
        whole: Size of the tensor.
        count: Of the parts.

    Example:
        >>> part_size(torch.zeros(4, 8), (12, 8), 2)
        [6, 8]
    """
    cut = [here != there for here, there in zip(part.shape, whole, strict=True)]
    return [-(-there // count) if is_cut else there for is_cut, there in zip(cut, whole, strict=True)]
