"""``KeptWeight``: a layer's ``W⊙M`` for dense products, made once for all products between two writes to the weight."""

import threading

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernels.masked_update.operator import apply_masks_
from ..kernels.tile_codes import unpack_codes
from ..kernels.torch_internals import storage_address
from ..masks.matrices import weight_of
from .eager import is_eager
from .tensor_state import fingerprint, hold

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their bytes."""


class KeptWeight:
    """The masked forms of one weight: by dtype, and by whether backward codes prune it too.

    A write is seen by the identities, storages and version counters of weight and codes. Writes through ``weight.data``
    leave those alone; on a CPU they are seen by a fingerprint of the weight, and elsewhere :attr:`writes` tells of
    them, because a device's answer would have to be waited for.

    Example:
        >>> kept, weight = KeptWeight(), torch.nn.Parameter(torch.ones(4, 4))
        >>> codes = torch.full((1, 1), 0x000F, dtype=torch.int16)  # keeps the first of four rows
        >>> first = kept.get(weight, weight, codes, None, torch.float32)
        >>> first.sum().item(), kept.get(weight, weight, codes, None, torch.float32) is first
        (4.0, True)
        >>> _ = weight.data.mul_(2)
        >>> kept.get(weight, weight, codes, None, torch.float32).sum().item()
        8.0
    """

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, bool], _Made] = {}
        self._bits: dict[tuple[bool, int], tuple[Tensor, int, Tensor]] = {}  # codes, their version, the mask
        self._lock = threading.Lock()
        self.writes = 0
        """Another number than before when the weight may have been written to."""

    @property
    def bytes(self) -> int:
        """Bytes that it takes on the device."""
        held = [made.masked for made in self._made.copy().values()]
        held += [bits for *_, bits in self._bits.copy().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def get(self, weight: Tensor, source: Tensor, codes: Tensor, backward: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the source with zeros where codes prune; not to be written to, and matrices are renewed in place.

        Args:
            weight: The parameter, which :func:`may_keep` has allowed.
            source: It or its matrix ``[O, K]``.
            codes: int16 ``[O/4, K/4]``.
            backward: Codes that prune it too, or None.
            dtype: Of the result.

        Returns:
            Shaped like the source; matrices are contiguous, and kernels in the source's order.
        """
        key = dtype, backward is not None
        made = self._made.get(key)
        if made is None or made.writes != self.writes or not made.is_of(weight, codes, backward):
            with self._lock, torch.inference_mode(False), torch.no_grad():
                made = self._made.get(key)
                if made is None or made.writes != self.writes or not made.is_of(weight, codes, backward):
                    masked = _room_for(source, dtype, None if made is None else made.masked)
                    self._mask_(masked, source.detach(), codes, backward)
                    made = self._made[key] = _Made(masked, weight, codes, backward, self.writes, made)
        return made.masked

    def prune_(self, gradient: Tensor, codes: Tensor) -> Tensor:
        """Write zeros where codes prune a gradient ``[O, K]``."""
        if gradient.is_cpu and gradient.element_size() in WORDS:
            with self._lock:
                bits = self._bits_of(codes, gradient.element_size())
            _words(gradient).bitwise_and_(bits)
        else:
            apply_masks_([gradient], [codes])
        return gradient

    def release(self) -> None:
        """Free the memory."""
        self._made, self._bits = {}, {}

    def _mask_(self, masked: Tensor, source: Tensor, codes: Tensor, backward: Tensor | None) -> None:
        by_bits = source.is_cpu and masked.element_size() in WORDS
        if by_bits and source.dtype == masked.dtype:
            # in one pass: another thread may read what is written again as it was
            bits = weight_of(self._bits_of(codes, masked.element_size()), source.shape)
            torch.bitwise_and(_words(source), bits, out=_words(masked))
        else:
            masked.copy_(source)
        for pruned, again in ((codes, False), (backward, True)):
            if pruned is None or (by_bits and source.dtype == masked.dtype and not again):
                continue
            if by_bits:
                bits = weight_of(self._bits_of(pruned, masked.element_size(), again), source.shape)
                _words(masked).bitwise_and_(bits)
            elif source.dim() == 2:
                apply_masks_([masked], [pruned])
            else:
                masked.masked_fill_(weight_of(unpack_codes(pruned).logical_not_(), source.shape), 0)

    def _bits_of(self, codes: Tensor, size: int, again: bool = False) -> Tensor:
        """Return integers ``[O, K]``, all bits of which say whether an entry is kept; renewed when codes have changed.

        They are as wide as what is masked by them, as processors mask words of equal widths faster.
        """
        held = self._bits.get((again, size))
        if held is None or held[0] is not codes or held[1] != codes._version:
            bits = unpack_codes(codes).to(WORDS[size]).neg_()
            held = self._bits[again, size] = codes, codes._version, bits
        return held[2]


class _Made:
    """``W⊙M`` and what it was made of; tensors are held, so that no other can be taken for them."""

    def __init__(
        self,
        masked: Tensor,
        weight: Tensor,
        codes: Tensor,
        backward: Tensor | None,
        writes: int,
        before: "_Made | None",
    ) -> None:
        self.masked, self.weight, self.codes, self.backward, self.writes = masked, weight, codes, backward, writes
        self._stamp = _stamp(weight, codes, backward)
        self._is_marked = weight.is_cpu
        # where the last was used only once, as in steps of one micro-batch, this one is likely to be
        self._mark = fingerprint(weight) if self._is_marked and (before is None or before.was_asked) else None
        self.was_asked: bool = False  # again, with nothing written as far as versions tell
        same = before is not None and before._stamp[3:] == self._stamp[3:]
        self._storage: StorageWeakRef = before._storage if before is not None and same else hold(weight)

    def is_of(self, weight: Tensor, codes: Tensor, backward: Tensor | None) -> bool:
        """Say whether it was made of these tensors as they are now."""
        same = self.weight is weight and self.codes is codes and self.backward is backward
        if not same or self._stamp != _stamp(weight, codes, backward):
            return False
        self.was_asked = True
        if not self._is_marked:
            return True
        return self._mark is not None and torch.equal(fingerprint(weight), self._mark)


def may_keep(weight: Tensor) -> bool:
    """Say whether a product may look at what is kept of a weight: in plain eager execution, of a plain tensor.

    Example:
        >>> may_keep(torch.zeros(4, 4)), may_keep(torch.zeros(4, 4, device="meta"))
        (True, False)
    """
    return (
        is_eager(weight)
        and not weight.is_meta
        and not weight.is_inference()
        and not (weight.is_cuda and torch.cuda.is_current_stream_capturing())  # a graph masks what it will find
    )


def _stamp(weight: Tensor, codes: Tensor, backward: Tensor | None) -> tuple[int, ...]:
    again = -1 if backward is None else backward._version
    return weight._version, codes._version, again, storage_address(weight), int(weight.storage_offset())


def _room_for(source: Tensor, dtype: torch.dtype, room: Tensor | None) -> Tensor:
    """Return the room there is, if it fits; kernels get new room, because graphs save those that they convolve by."""
    if source.dim() > 2:
        return torch.empty_like(source, dtype=dtype)
    if room is None or (room.shape, room.device) != (source.shape, source.device):
        return torch.empty_like(source, dtype=dtype, memory_format=torch.contiguous_format)
    return room


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(WORDS[tensor.element_size()])
