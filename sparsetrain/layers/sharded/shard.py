"""``Shard``: the part of a layer's weight that lies in this process, and what FSDP2 gathers of it."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from ...distributed.shards import local
from ...kernels.torch_internals import storage_address


class Sender(Protocol):
    """A layer whose weight is spread."""

    def sent_part(self, dtype: torch.dtype) -> Tensor:
        """Return what products see of the part that lies here, shaped like it; what is pruned is -0."""


class Shard:
    """The part of a weight that lies here. FSDP2 gathers what products see of it, so all other ranks get zeros too.

    The parts have FSDP2's extension methods, which it looks for on the local tensors of its parameters. What travels
    is of the weight's own shape in the dtype of the mixed precision policy; pruned entries are -0, kept ones never
    are, so the mask of the whole weight can be read from it.

    Args:
        layer: Whose weight it is.
        weight: A DTensor.
    """

    def __init__(self, layer: Sender, weight: Tensor) -> None:
        self._layer = weakref.ref(layer)
        self.weight = weight
        self.name = ""
        self.gathered: Tensor | None = None
        """The parameter that FSDP2 puts into the layer's place while it is gathered."""
        self.is_fresh = False
        """Whether what is gathered now has been sent by this shard, as the mask is."""
        self._whole: Tensor | None = None
        self.attach()

    @property
    def part(self) -> Tensor:
        """The part that lies here, without a graph."""
        return local(self.weight)

    def attach(self) -> None:
        """Hang on the local tensor, which conversions replace."""
        part: Any = self.part
        if getattr(getattr(part, "fsdp_pre_all_gather", None), "shard", None) is not self:
            part.fsdp_pre_all_gather, part.fsdp_post_all_gather = Send(self), Receive(self)
            self.is_fresh = False

    def takes(self, parameter: Tensor) -> bool:
        """Say whether FSDP2 only swaps the layer's weight for this parameter, gathered or not, and take note of it."""
        if parameter is self.weight:
            self.is_fresh = False
            return True
        if parameter is self.gathered:
            return True
        if self._whole is not None and storage_address(local(parameter)) == storage_address(self._whole):
            self.gathered = parameter
            return True
        return False

    def send(self, mesh: Any, size: torch.Size, dtype: torch.dtype | None) -> Tensor:
        """Return what is sent: what products see of the part, as large as the largest part."""
        layer = self._layer()
        assert layer is not None
        part = self.part
        seen = layer.sent_part(dtype or part.dtype)
        padded = [
            -(-whole // mesh.size()) if here != whole else whole for here, whole in zip(part.shape, size, strict=True)
        ]
        if list(seen.shape) == padded:
            return seen.contiguous()
        room = seen.new_zeros(padded)
        room[tuple(slice(0, length) for length in seen.shape)] = seen
        return room

    def receive(self, whole: Tensor) -> Tensor:
        """Take note of what was gathered."""
        self._whole, self.is_fresh = whole, True
        return whole

    def require_fresh(self) -> None:
        """Raise ``RuntimeError`` unless the weight that products are about to see has been sent by this shard."""
        if not self.is_fresh:
            raise RuntimeError(
                f"layer {self.name!r} was gathered without its mask: its local tensor was replaced after the model was "
                "sharded, so call training.apply_masks_() after that, or convert the model before fully_shard."
            )


class Send:
    """FSDP2's ``fsdp_pre_all_gather``; copied or pickled with the tensor, it says that it belongs to another."""

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard

    def __reduce__(self) -> tuple[Any, ...]:
        return Send, ()

    def __call__(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """Return what is sent, and nothing beside it."""
        assert self.shard is not None
        return (self.shard.send(mesh, outer_size, mp_policy.param_dtype),), None


class Receive:
    """FSDP2's ``fsdp_post_all_gather``."""

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard

    def __reduce__(self) -> tuple[Any, ...]:
        return Receive, ()

    def __call__(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the weight that was gathered, and nothing beside it."""
        assert self.shard is not None
        return self.shard.receive(outputs[0]), ()
