"""What tells that a tensor was written to or replaced: its version and place, or a fingerprint of its numbers."""

import functools

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..kernels.torch_internals import storage_address

Stamp = tuple[int, ...]

PERIOD = 8 * 61
"""Words after which places begin again in the fingerprint of a 16-bit weight: whole vectors, and with a prime, so that
moved rows or columns change places."""


def stamp_of(*tensors: Tensor) -> Stamp | None:
    """Return numbers that change when a tensor is written to or replaced; None if that cannot be known.

    Example:
        >>> weight = torch.zeros(4)
        >>> before = stamp_of(weight)
        >>> before == stamp_of(weight.add_(1))
        False
    """
    numbers: list[int] = []
    for tensor in tensors:
        if tensor.is_inference():
            return None
        numbers += (storage_address(tensor), int(tensor.storage_offset()), tensor._version)
    return tuple(numbers)  # three of each


def stamp_of_sources(weight: Tensor, codes: Tensor, backward: Tensor | None) -> Stamp | None:
    """Return the stamp of what operands are filled from."""
    if backward is not None:
        return stamp_of(weight, codes, backward)
    if weight.is_inference() or codes.is_inference():
        return None
    return (  # what stamp_of returns, without a loop: every layer asks in every step
        storage_address(weight),
        int(weight.storage_offset()),
        weight._version,
        storage_address(codes),
        int(codes.storage_offset()),
        codes._version,
    )


def hold(tensor: Tensor) -> StorageWeakRef:
    """Return what keeps the address of a tensor's storage from being another's; not the storage itself.

    Example:
        >>> weight = torch.zeros(4)
        >>> hold(weight).expired()
        False
    """
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def fingerprint(weight: Tensor) -> Tensor:
    """Return numbers that change when a weight is written to; not equal to themselves where the weight has NaN.

    They are the product with a fixed random vector, a number a row: what is lost in rounding them is lost in any such
    product. Of 16-bit weights, whose products are rounded sooner, they are one sum of the bits.

    Args:
        weight: Of two dimensions or more, on the CPU.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4, 8))
        >>> before = fingerprint(weight)
        >>> torch.equal(before, fingerprint(weight))
        True
        >>> weight.data[0, 3] = 2
        >>> torch.equal(before, fingerprint(weight))
        False
    """
    rows, dtype = weight.detach(), weight.dtype
    if not rows.is_contiguous():  # in the order of the memory, if that is one
        rows = rows.t() if rows.dim() == 2 else rows.movedim(1, -1)
    if dtype is torch.float32 or dtype is torch.float64:
        if rows.dim() > 2:
            rows = rows.flatten(1)  # a copy only if the weight is spread over more memory than it has
        count, columns = rows.shape
        # autocast leaves what has an output as it is
        return torch.mv(rows, _random(columns, dtype), out=rows.new_empty(count))
    flat = rows.reshape(-1)
    words = flat.view(torch.int16 if flat.storage_offset() % 4 else torch.int64)
    whole = words.numel() // PERIOD * PERIOD
    rest = words[whole:]
    total = torch.dot(rest.to(torch.int64), _keys()[: rest.numel()])
    if whole:
        total += torch.dot(words[:whole].view(-1, PERIOD).sum(0), _keys())
    return total


@functools.lru_cache(maxsize=64)
def _random(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randn(count, generator=generator, dtype=dtype, device="cpu")


@functools.cache
def _keys() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return torch.randint(-(1 << 62), 1 << 62, (PERIOD,), generator=generator, device="cpu") | 1
