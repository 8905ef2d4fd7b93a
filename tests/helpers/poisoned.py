"""Tensors in the middle of poisoned memory: what a kernel reads or writes beside them is noticed."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

POISON = 0xFF  # every byte: NaN in all floating dtypes, -1 in integers
MARGIN = 64  # elements on either side, so that alignment is that of a tensor of its own


@dataclass
class Margins:
    """Gives out tensors and looks after what lies around them.

    ``check`` fails if anything was written there; what is read there, and tensors that nobody filled, are NaN or -1.
    """

    device: str = "cpu"
    _held: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, gap: int = 0) -> Tensor:
        """Return a poisoned tensor; ``gap`` poisoned elements lie between its rows."""
        rows, width = math.prod(shape[:-1]), shape[-1] + gap
        size = (2 * MARGIN + rows * width) * dtype.itemsize
        buffer = torch.full((size,), POISON, dtype=torch.uint8, device=self.device)
        inner = buffer.view(dtype)[MARGIN : MARGIN + rows * width].view(*shape[:-1], width)
        tensor = inner[..., : shape[-1]]
        self._held.append((buffer, tensor))
        return tensor

    def of(self, tensor: Tensor, gap: int = 0) -> Tensor:
        """Return a copy on the device, its last dimension contiguous."""
        return self.empty(*tensor.shape, dtype=tensor.dtype, gap=gap).copy_(tensor)

    def like(self, tensor: Tensor) -> Tensor:
        """Return a poisoned tensor of the same shape and dtype."""
        return self.empty(*tensor.shape, dtype=tensor.dtype)

    def check(self) -> None:
        """Fail if anything beside the tensors was written."""
        for buffer, tensor in self._held:
            rest = buffer.clone()
            start = tensor.storage_offset() - buffer.storage_offset() // tensor.itemsize
            inside = rest.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), start)
            inside.view(torch.uint8).fill_(POISON)
            wrong = (rest != POISON).nonzero().flatten()
            assert wrong.numel() == 0, (
                f"{wrong.numel()} bytes beside a {tensor.dtype} {tuple(tensor.shape)} were written, the first at "
                f"{(int(wrong[0]) - start * tensor.itemsize)} from its beginning"
            )
