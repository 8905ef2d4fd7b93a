"""``Layout``: how a tensor is spread over processes, and the ways between the whole, a DTensor and the part here."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shards import gathered, is_cut, is_spread, local, part_of, spread_over


class Layout(NamedTuple):
    """How a tensor is spread over processes; nowhere, by default.

    Args:
        shape: Of the whole tensor.
        dtype: Likewise.
        mesh: Of the processes; None if every process has the whole tensor.
        placements: One for each dimension of the mesh.

    Example:
        >>> Layout((2,), torch.float32).part(torch.ones(2)).tolist()
        [1.0, 1.0]
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    def spread(self, part: Tensor) -> Tensor:
        """Return a DTensor of the part that lies here; the part itself if nothing is spread."""
        return part if self.mesh is None else spread_over(part.contiguous(), self.mesh, self.placements, self.shape)

    def part(self, tensor: Tensor) -> Tensor:
        """Return the part that lies here of a DTensor in any layout, or of a whole tensor.

        Only a DTensor in another layout is sent: then every process of its mesh has to call this.
        """
        if is_spread(tensor):
            if self.holds(tensor):
                return local(tensor)
            tensor = gathered(tensor)
        return tensor if self.mesh is None else part_of(tensor, self.mesh, self.placements).contiguous()

    def holds(self, tensor: Tensor) -> bool:
        """Say whether a tensor is spread like this, so that nothing needs to be sent."""
        if not is_spread(tensor):
            return self.mesh is None
        return tensor.device_mesh == self.mesh and tuple(tensor.placements) == self.placements  # type: ignore[attr-defined]

    def zeros(self) -> Tensor:
        """Return zeros in this layout, on the mesh's device; on the CPU if nothing is spread."""
        shape, device = self.shape, "cpu"
        if self.mesh is not None:
            device = self.mesh.device_type
            shape = tuple(part_of(torch.empty(shape, device="meta"), self.mesh, self.placements).shape)
        return self.spread(torch.zeros(shape, dtype=self.dtype, device=device))


def layout_of(tensor: Tensor) -> Layout:
    """Return how a tensor is spread.

    Example:
        >>> layout_of(torch.ones(2, 3)).shape
        (2, 3)
    """
    if not is_spread(tensor):
        return Layout(tuple(tensor.shape), tensor.dtype)
    return Layout(tuple(tensor.shape), tensor.dtype, tensor.device_mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def matrix_layout(weight: Tensor, dtype: torch.dtype, transposed: bool = False, tile: int = 1) -> Layout:
    """Return how a matrix ``[O, K]`` is spread beside its weight, or one with an entry for each of its tiles.

    Args:
        weight: ``[O, I, *kernel]``, a DTensor or plain.
        dtype: Of the matrix.
        transposed: The weight is ``[I, O]``.
        tile: Rows and columns of a tile.

    Example:
        >>> matrix_layout(torch.ones(8, 4, 3), torch.int16, tile=4).shape
        (2, 3)
    """
    rows = weight.shape[int(transposed)]
    shape = (rows // tile, weight.numel() // rows // tile)
    _, _, mesh, placements = layout_of(weight)
    return Layout(shape, dtype, mesh, tuple(map(_swapped, placements)) if transposed else placements)


def _swapped(placement: Any) -> Any:
    """Return a placement of the transpose."""
    if not is_cut(placement):
        return placement
    strides = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(1 - placement.dim, **strides)
