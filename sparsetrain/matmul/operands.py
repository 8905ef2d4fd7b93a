"""``Operands``: the masked weight of a layer in the forms that backends multiply by, renewed after any write to it."""

import weakref
from collections.abc import Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..backends import BACKENDS, Backend, Operand
from ..backends.packing import PackJob, fill_, jobs_of
from ..dispatch import Choice, Product
from .bias_copy import BiasCopy
from .execution import Execution
from .kept_weight import KeptWeight
from .tensor_state import Stamp, hold, stamp_of_sources
from .wire_operands import WireOperands

MAX_IDLE = 8
"""Renewals that an operand outlives without being used."""

Key = tuple[str, Product, torch.dtype]
"""Backend, the product that reads the operand (the input gradient's reads Wᵀ), dtype."""

_SHARED: weakref.WeakValueDictionary[tuple[object, ...], Operand] = weakref.WeakValueDictionary()
"""Operands that are filled again before every use, one of each shape."""


class Layer(Protocol):
    """What owns operands."""

    mask_codes: Tensor
    backward_codes: Tensor | None
    operands: "Operands"

    @property
    def weight(self) -> Tensor:
        """The master."""

    @property
    def matrix(self) -> Tensor:
        """The master as a matrix, which shares its storage where products are sparse."""

    @property
    def bias(self) -> Tensor | None:
        """The bias, if there is one."""


class Operands:
    """The packed forms of one weight: made when a product first asks, renewed in place when the weight has changed.

    A change is seen by the version counters and storages of weight and codes, and an optimizer's step counts as one,
    because fused optimizers leave the counters alone. Other writes without a trace, as those through ``weight.data``,
    have to be told by :meth:`invalidate`.

    With backward codes, Wᵀ is packed at the places that they keep, with zeros where the mask prunes.

    Who sets ``managed``, for good, has a :class:`~sparsetrain.matmul.renewal.Renewal` fill them after each step; a CUDA
    graph then reads what it finds. In other graphs every product is captured with the packing before it.
    """

    generation: ClassVar[int] = 0
    """Of all layers: goes up with every change of what a renewal finds in them, so that it need not look."""

    def __init__(self, execution: Execution | None = None) -> None:
        self.execution = execution or Execution()
        self.managed = False
        self.choices: dict[tuple[Product, int, torch.dtype, bool, str], Choice] = {}
        self.owner: weakref.ref[Layer] | None = None
        self._made: dict[Key, Operand] = {}
        self._jobs: list[PackJob] | None = None  # of all that is made, for the tensors that they name
        self._renewals = 0
        self._used: dict[Key, int] = {}  # of what is made, the renewal after which it was used last
        self._captured: set[Key] = set()
        self._shared: dict[tuple[object, ...], Operand] = {}
        self.stamp: Stamp | None = None
        """What tells the state of the weight that they were filled from; None if they are out of date."""
        self._fresh: Stamp | None = None  # of what a refresh or a step packed, which the renewal after it need not
        self._held: tuple[StorageWeakRef, ...] = ()  # so that no other storage gets the stamp's address
        self._held_storages: Stamp | None = None  # the addresses of those
        self.biases: dict[torch.dtype, BiasCopy] = {}  # copies in other dtypes
        self.wired: WireOperands | None = None
        """Those of a weight that comes packed over the wire, which are made in another way."""
        self._device: torch.device | None = None
        self._kept: KeptWeight | None = None
        self._writes = 0  # goes up when the weight may have been written to without a trace

    def __deepcopy__(self, memo: dict[int, object]) -> "Operands":
        return Operands(self.execution)  # the copy has another weight

    def __reduce__(self) -> tuple[object, ...]:
        return Operands, (self.execution,)

    @property
    def kept(self) -> KeptWeight:
        """The masked weight in the forms that dense products multiply by."""
        if self._kept is None:
            self._kept = KeptWeight()
        self._kept.writes = self._writes
        return self._kept

    @property
    def bytes(self) -> int:
        """Bytes that the operands take on the device."""
        return sum(operand.bytes for operand in self._made.values()) + (self._kept.bytes if self._kept else 0)

    @property
    def is_packed(self) -> bool:
        """Whether there is something that a renewal fills."""
        return bool(self._made)

    def at(self, stamp: Stamp | None, backend: Backend, product: Product, dtype: torch.dtype) -> Operand | None:
        """Return an operand that was there when :attr:`stamp` was this one, and is still of that state of the weight.

        It is for backwards, whose saved weight has not changed since the forward; None if :meth:`get` has to look.
        """
        key = (backend.name, product, dtype)
        operand = self._made.get(key) if stamp is not None and stamp is self.stamp else None
        if operand is None or (operand.tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        self._used[key] = self._renewals
        return operand

    def get(
        self,
        weight: Tensor,
        codes: Tensor,
        backend: Backend,
        product: Product,
        dtype: torch.dtype,
        backward: Tensor | None = None,
    ) -> Operand:
        """Return W, or Wᵀ for the input gradient, masked, as the backend reads it; up to date.

        Raises:
            RuntimeError: If a CUDA graph is being captured and there is no operand yet.
        """
        capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
        stamp = stamp_of_sources(weight, codes, backward)
        if stamp is None or stamp != self.stamp or (capturing and not self.managed):
            if self._device not in (None, weight.device):
                self.release(captured=True)
            self._device = weight.device
            fill_(self.to_fill(weight, codes, backward))
            self.renewed(stamp_of_sources(weight, codes, backward), weight, codes, backward)
            self.stamp = None if capturing else self.stamp  # what is captured has not happened yet
        if backend.symmetric and backward is None and product == "input_gradient":
            operand = self.get(weight, codes, backend, "forward", dtype)
            return Operand(operand.shape[::-1], (operand.tensors[0].t(),))
        key = (backend.name, product, dtype)
        self._used[key] = self._renewals
        if capturing:
            self._captured.add(key)
        if key not in self._made:
            return self._make(weight, codes, backward, backend, key, capturing)
        return self._made[key]

    def _make(
        self, weight: Tensor, codes: Tensor, backward: Tensor | None, backend: Backend, key: Key, capturing: bool
    ) -> Operand:
        transposed, dtype = key[1] == "input_gradient", key[2]
        keep = self.execution.keep_transposed or not transposed
        shape = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        shared = (backend.name, shape, dtype, weight.device)
        operand = None if keep else self._shared.get(shared) or _SHARED.get(shared)
        if operand is None:
            operand = _allocate(backend, shape, dtype, weight, capturing)
        if not keep:
            self._shared[shared] = _SHARED[shared] = operand
        alone = keep or backward is not None
        first = None if alone else self._made.get((backend.name, "forward", dtype))  # written as it is
        parts = (first, operand) if transposed else (operand, None)
        fill_(jobs_of(weight, codes, backward, backend, dtype, *parts))
        if keep:
            self._made[key], self._jobs = operand, None
            self.changed()
        return operand

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the bias in ``dtype``, at an address that stays."""
        if bias is None or bias.dtype == dtype:
            return bias
        held = self.biases.get(dtype)
        if held is None or held.tensor.device != bias.device:
            held = self.biases[dtype] = BiasCopy(bias, dtype)
            self.changed()
        held.follow_(bias, self.managed)
        return held.tensor

    def invalidate(self) -> None:
        """Have everything renewed before its next use."""
        self.invalidate_all([self])

    @staticmethod
    def invalidate_all(every: Iterable["Operands"]) -> None:
        """Do what :meth:`invalidate` does to the operands of many layers."""
        for operands in every:
            operands.stamp = operands._fresh = None
            operands._writes += 1
            for held in operands.biases.values() if operands.biases else ():
                held.stamp = None

    def release(self, captured: bool = False) -> None:
        """Free memory; what CUDA graphs read stays unless ``captured``."""
        kept = set() if captured else self._captured
        self._made, self._jobs = {key: made for key, made in self._made.items() if key in kept}, None
        self.changed()
        self._used = dict.fromkeys(self._made, self._renewals)
        self._captured = set(kept)
        self._kept = None
        if not kept:
            self._shared.clear()
            self.biases.clear()
        self.invalidate()

    def packed_alone(self) -> tuple[Operand | None, Operand | None] | None:
        """Return W's and Wᵀ's operand to write now, or None if there are others, or none that the packer writes whole.

        Who writes them calls :meth:`written`.
        """
        if any(operand.values is None or operand.meta is None for operand in self._made.values()):
            return None
        products, dtypes = {key[1] for key in self._made}, {key[2] for key in self._made}
        if len(dtypes) != 1 or len(products) < len(self._made):
            return None
        found = {product: operand for (_, product, _), operand in self._stale().items()}
        return (found.get("forward"), found.get("input_gradient")) if found else None

    def written(self, weight: Tensor, codes: Tensor) -> None:
        """Take note that all operands were written from these, so that the next renewal leaves them."""
        self.renewed(stamp_of_sources(weight, codes, None), weight, codes)
        self._fresh = self.stamp
        self.changed()

    def take_fresh(self, weight: Tensor, codes: Tensor, backward: Tensor | None) -> bool:
        """Return whether all operands were written from these, and nothing since; only once."""
        fresh, self._fresh = self._fresh, None
        return fresh is not None and fresh == stamp_of_sources(weight, codes, backward)

    @property
    def is_idle(self) -> bool:
        """Whether something was not used for so long that the next renewal forgets it."""
        return bool(self._made) and self._renewals - min(self._used.values()) > MAX_IDLE

    def _stale(self) -> dict[Key, Operand]:
        """Forget what nobody used for long, and return the rest; captured graphs use theirs unseen."""
        self._renewals += 1
        if self.is_idle:
            last = {key: self._renewals if key in self._captured else self._used[key] for key in self._made}
            self._used = {key: used for key, used in last.items() if self._renewals - used <= MAX_IDLE}
            if len(self._used) < len(self._made):
                self._made, self._jobs = {key: self._made[key] for key in self._used}, None
                self.changed()
        return self._made

    @staticmethod
    def changed() -> None:
        """Have renewals look again at the layers: another tensor, operand or soft threshold is there."""
        Operands.generation += 1

    def to_fill(self, weight: Tensor, codes: Tensor, backward: Tensor | None) -> list[PackJob]:
        """Count a renewal and return how what is left is filled; the same objects for the same tensors."""
        made, kept = self._stale(), self._jobs
        if kept and kept[0].weight is weight and backward is None and kept[0].codes is codes:
            return kept
        jobs = []
        for name, dtype in {(name, dtype): None for name, _, dtype in made}:
            parts = made.get((name, "forward", dtype)), made.get((name, "input_gradient", dtype))
            jobs += jobs_of(weight, codes, backward, BACKENDS[name], dtype, *parts)
        self._jobs = jobs if backward is None else None
        return jobs

    def renewed(self, stamp: Stamp | None, *tensors: Tensor | None) -> None:
        """Take note that everything was filled from tensors whose stamp this is; what dense products keep is older."""
        self.stamp = stamp
        self._writes += 1
        storages = None if stamp is None else stamp[::3]
        if storages is None or storages != self._held_storages:
            self._held = tuple(hold(tensor) for tensor in tensors if tensor is not None)
            self._held_storages = storages

    @staticmethod
    def renewed_again(every: Iterable["Operands"], stamps: Iterable[Stamp]) -> None:
        """Take note of another renewal of operands, in which all was filled again from the same memory."""
        for operands, stamp in zip(every, stamps, strict=True):
            operands.stamp = stamp
            operands._renewals += 1
            operands._writes += 1

    @property
    def may_fall_back(self) -> bool:
        """Whether products may be dense if packing fails."""
        return self.execution.backend == "auto" and not self._captured

    def renew_bias_(self, bias: Tensor) -> None:
        """Copy the bias again into its other dtypes."""
        for held in self.biases.values():
            held.repack_(bias)


def _allocate(backend: Backend, shape: tuple[int, int], dtype: torch.dtype, weight: Tensor, capturing: bool) -> Operand:
    if capturing:
        raise RuntimeError(
            f"a CUDA graph is being captured but the weight {tuple(weight.shape)} was not packed for {backend.name} "
            "yet: run the step once before capturing it."
        )
    with torch.inference_mode(False):
        return backend.allocate(shape, dtype, weight.device)
