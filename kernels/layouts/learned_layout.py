"""``LearnedLayout``: an order of metadata as a gather, by which natural metadata is written behind packed values."""

import functools
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor


class LayoutError(ValueError):
    """A compressor whose metadata is no fixed permutation of natural metadata behind natural values."""


@dataclass(frozen=True, eq=False)
class LearnedLayout:
    """Where the units of natural metadata lie in a vendor's buffer, behind the values.

    Args:
        rows: R of the matrix ``[R, C]``.
        columns: C.
        unit_bits: What is moved in one piece: words of 16 bits, bytes or nibbles.
        source: int32; for every place behind the values, the natural unit that lies there, or -1 for padding.
        padding: What lies at the places of -1, in their order: int16 words, or uint8 bytes or nibbles; zero where the
            vendor's padding is not constant.

    Raises:
        LayoutError: If the sizes, dtypes or entries do not fit.

    Example:
        >>> swapped = torch.tensor([1, 0, -1], dtype=torch.int32)
        >>> layout = LearnedLayout(1, 32, 16, swapped, padding=torch.zeros(1, dtype=torch.int16))
        >>> tail = torch.ones(3, dtype=torch.int16)
        >>> layout.arrange_(torch.tensor([[5, 7]], dtype=torch.int16), tail)
        >>> tail.tolist()
        [7, 5, 0]
    """

    rows: int
    columns: int
    unit_bits: int
    source: Tensor
    padding: Tensor
    _gather: Tensor = field(init=False, repr=False)
    _padded: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.unit_bits not in (4, 8, 16):
            raise LayoutError(f"unit_bits is {self.unit_bits}: it must be 16, 8 or 4.")
        units = self.rows * self.columns // self.unit_bits
        if self.source.dtype != torch.int32 or self.source.dim() != 1 or self.source.numel() < units:
            raise LayoutError(
                f"source is {self.source.dtype} {tuple(self.source.shape)}: it must be torch.int32 with at least "
                f"{units} entries."
            )
        if units and (int(self.source.min()) < -1 or int(self.source.max()) >= units):
            raise LayoutError(f"source has entries outside of -1 to {units - 1}: relearn the layout.")
        padded = (self.source < 0).nonzero().flatten()
        kind = torch.int16 if self.unit_bits == 16 else torch.uint8
        if self.padding.dtype != kind or self.padding.shape != padded.shape:
            raise LayoutError(
                f"padding is {self.padding.dtype} {tuple(self.padding.shape)}: with this source it must be {kind} "
                f"{tuple(padded.shape)}."
            )
        object.__setattr__(self, "_gather", self.source.clamp(min=0) if padded.numel() else self.source)
        object.__setattr__(self, "_padded", padded)

    @torch.no_grad()
    def arrange_(self, meta: Tensor, tail: Tensor) -> None:
        """Write natural metadata, in the vendor's order, behind the values; never waits for the device.

        Args:
            meta: int16 ``[R, C/16]``, natural order.
            tail: What lies behind the R·C/2 values of a vendor's buffer: contiguous, of any 16-bit dtype; overwritten.

        Raises:
            ValueError: If a shape, dtype or device does not fit; nothing is written then.
        """
        self._check(meta, tail)
        words = tail.view(-1).view(torch.int16)
        natural = meta.reshape(-1)
        if self.unit_bits == 4:
            units = natural.view(torch.uint8).index_select(0, self._gather >> 1)
            units.bitwise_right_shift_((self._gather & 1).mul_(4).to(torch.uint8)).bitwise_and_(0xF)
            pairs = self._pad_(units).view(-1, 2)
            torch.bitwise_or(pairs[:, 0], pairs[:, 1] << 4, out=words.view(torch.uint8))
        else:
            kind = self.padding.dtype
            self._pad_(torch.index_select(natural.view(kind), 0, self._gather, out=words.view(kind)))

    @property
    def words(self) -> int:
        """Words behind the values, padding among them."""
        return self.source.numel() * self.unit_bits // 16

    @functools.cached_property
    def places(self) -> Tensor | None:
        """Int32 ``[R·C/16]``: where every natural word lies behind the values; None if that is no single place."""
        words = self.rows * self.columns // 16
        lying = (self.source >= 0).nonzero().flatten()
        if self.unit_bits != 16 or lying.numel() != words:
            return None
        places = torch.full((words,), -1, dtype=torch.int32, device=self.source.device)
        places.index_copy_(0, self.source[lying].long(), lying.int())
        return None if bool((places < 0).any()) else places

    def pad_(self, tail: Tensor) -> None:
        """Write the padding of an order of words behind the values; the rest stays."""
        self._pad_(tail.view(-1).view(torch.int16))

    def _pad_(self, units: Tensor) -> Tensor:
        return units.index_copy_(0, self._padded, self.padding) if self._padded.numel() else units

    def to(self, device: torch.device) -> "LearnedLayout":
        """Return the layout with its tables on a device."""
        moved = copy(self)
        for name in ("source", "padding", "_padded"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        moved.__dict__.pop("places", None)
        shared = self._gather is self.source
        object.__setattr__(moved, "_gather", moved.source if shared else self._gather.to(device))
        return moved

    def _check(self, meta: Tensor, tail: Tensor) -> None:
        shape, device = (self.rows, self.columns // 16), self.source.device
        if meta.dtype != torch.int16 or tuple(meta.shape) != shape or meta.device != device:
            raise ValueError(
                f"meta is {meta.dtype} {tuple(meta.shape)} on {meta.device}: it must be torch.int16 {shape} on "
                f"{device}."
            )
        words = self.words
        fits = tail.numel() == words and tail.dtype.itemsize == 2 and tail.is_contiguous()
        if not fits or tail.device != device:
            raise ValueError(
                f"tail is {tail.dtype} {tuple(tail.shape)} on {tail.device}: it must be the {words} contiguous 16-bit "
                f"elements behind the values, on {device}."
            )
