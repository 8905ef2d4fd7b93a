"""``Shard``: the part of a layer's weight that lies in this process, and what FSDP2 gathers of it."""

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...distributed.shards import local
from ...kernels.torch_internals import storage_address
from .wires import DoublePrunedWire, MaskedWire, SpreadLayer, Wire, part_size


class Shard:
    """The part of a weight that lies here, with FSDP2's extension methods on it, which send it by a wire.

    So what is gathered is what products see, and all other ranks' masks come with it.

    Args:
        layer: Whose weight it is.
        weight: A DTensor.
    """

    def __init__(self, layer: SpreadLayer, weight: Tensor) -> None:
        self._layer = weakref.ref(layer)
        self.weight = weight
        self.name = ""
        """Of the layer."""
        state = layer.__dict__
        further = state.get("backward_codes") is not None and state["phase"] != "dense"
        self.wire: Wire = DoublePrunedWire() if further else MaskedWire()
        self._size: tuple[int, ...] = ()  # of what is sent, and in which dtype, where FSDP2 does not tell
        self._dtype: torch.dtype | None = None
        self.gathered: Tensor | None = None
        """The parameter that FSDP2 puts into the weight's place while it is gathered."""
        self.is_fresh = False
        """Whether what is gathered now was sent by the wire, as the mask is then."""
        self._whole: Tensor | None = None
        self.is_followed = False
        """Whether it is attached again when FSDP2 replaces the local tensor to pad it."""
        self.attach()

    @property
    def part(self) -> Tensor:
        """The part that lies here, without a graph."""
        return local(self.weight)

    def attach(self) -> bool:
        """Hang on the local tensor, which conversions replace, for the wire as it is now; return whether it had to."""
        part: Any = self.part
        send = part.__dict__.get("fsdp_pre_all_gather")
        wanted = Send if self._size else SendToldSize
        if type(send) is wanted and send.shard is self:
            return False
        part.fsdp_pre_all_gather, part.fsdp_post_all_gather = wanted(self), Receive(self)
        self.is_fresh = False
        return True

    def detach(self) -> None:
        """Leave the local tensor, which is sent as it is then."""
        for name in ("fsdp_pre_all_gather", "fsdp_post_all_gather"):
            self.part.__dict__.pop(name, None)

    def use(self, wire: Wire, size: Sequence[int], dtype: torch.dtype | None) -> None:
        """Have the part sent by another wire from now on; FSDP2 has to make its buffers again.

        Args:
            wire: The other.
            size: Of the largest part.
            dtype: In which products see the weight; None for its own.
        """
        self.wire, self._size, self._dtype = wire, tuple(size), dtype
        self.gathered = self._whole = None
        self.attach()

    def takes(self, parameter: Tensor) -> bool:
        """Say whether FSDP2 only swaps the layer's weight for this parameter, gathered or not, and take note of it."""
        if parameter is self.weight:
            self.is_fresh = False
            return True
        if parameter is self.gathered:
            return True
        if self._whole is None or storage_address(local(parameter)) != storage_address(self._whole):
            return False
        self.gathered = parameter
        self.wire.settle(parameter)
        return True

    def send(self, size: Sequence[int] = (), dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Return what is sent.

        Args:
            size: Of the largest part; empty for that of :meth:`use`.
            dtype: Of the products; None for that of :meth:`use`, or else the weight's own.
        """
        layer = self._layer()
        assert layer is not None
        with torch.no_grad():
            return self.wire.send(layer, size or self._size, dtype or self._dtype or self.weight.dtype)

    def receive(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Return what stands for the weight that was gathered."""
        layer = self._layer()
        assert layer is not None
        self._whole, self.is_fresh = self.wire.receive(layer, parts), True
        return self._whole

    def require_fresh(self) -> None:
        """Raise ``RuntimeError`` unless the weight that products are about to see was sent by the wire."""
        if not self.is_fresh:
            raise RuntimeError(
                f"layer {self.name!r} was gathered without its mask, because its local tensor was replaced after the "
                "model was sharded: convert and load the model before fully_shard, or write into its weights."
            )


class Hook:
    """One of FSDP2's extension methods on a local tensor; copied or pickled with it, it is nobody's."""

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class SendToldSize(Hook):
    """``fsdp_pre_all_gather`` with five arguments; of uneven parts, FSDP2 then takes none of another shape."""

    def __call__(
        self, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """Return what is sent, and nothing beside it."""
        assert self.shard is not None
        size = part_size(self.shard.part, outer_size, mesh.size())
        if type(self.shard.wire) is not MaskedWire and outer_size.numel() != math.prod(size) * mesh.size():
            raise RuntimeError(
                f"layer {self.shard.name!r} prunes its input gradient further, and its parts are uneven: make the run "
                "after fully_shard."
            )
        return self.shard.send(size, mp_policy.param_dtype), None


class Send(Hook):
    """``fsdp_pre_all_gather`` with one argument, after which parts may have any shape."""

    def __call__(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """Return what is sent, and nothing beside it."""
        assert self.shard is not None
        return self.shard.send(), None


class Receive(Hook):
    """``fsdp_post_all_gather``."""

    def __call__(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the weight that was gathered, and a list of tensors whose memory FSDP2 takes away with it."""
        assert self.shard is not None
        return self.shard.receive(outputs), self.shard.wire.memory
