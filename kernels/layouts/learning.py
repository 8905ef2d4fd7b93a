"""Learning where a vendor's compressor puts metadata, from probes whose metadata says where it came from."""

import functools
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..pack import unpack_rows

Compressor = Callable[[Tensor], Tensor]
"""Of an exactly 2:4 float16 or bfloat16 ``[R, C]``: one contiguous buffer of any shape, values first, then metadata."""

_NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)  # i0 | i1 << 2 of the six pairs: a digit of base 6
_NO_DIGIT = 255
_MOST_CHECKS = 16  # garbage passes one with probability 1/6
_VERIFICATIONS = 3


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


@torch.no_grad()
def learn_layout(
    compress: Compressor, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> LearnedLayout:
    """Learn the order of a vendor's metadata by compressing matrices whose nibbles spell their own number.

    Args:
        compress: Takes an exactly 2:4 ``[R, C]``; returns one contiguous buffer: R·C/2 values row by row, then metadata
            in any order, with any padding.
        rows: R, a multiple of 4.
        columns: C, a multiple of 16.
        dtype: Of the matrices: float16 or bfloat16.
        device: Of the matrices.

    Returns:
        The order in its largest unit: words of 16 bits, bytes or nibbles. It gave the vendor's bytes for three random
        matrices, padding aside.

    Raises:
        LayoutError: If sizes or dtype do not fit, values are not first and natural, some nibble ``i0 | i1 << 2`` is not
            found exactly once, or a random matrix is compressed otherwise.

    Example:
        >>> from sparsetrain.kernels.layouts import to_cutlass
        >>> from sparsetrain.kernels.pack.reference import pack
        >>> from sparsetrain.kernels.tile_codes.reference import pack_codes
        >>> def compress(matrix):
        ...     values, meta = pack(matrix, pack_codes(matrix != 0), matrix.dtype, transposed=False)
        ...     return torch.cat([values.flatten(), to_cutlass(meta).flatten().view(matrix.dtype)])
        >>> layout = learn_layout(compress, 32, 64, torch.float16, torch.device("cpu"))
        >>> layout.unit_bits, layout.source[:6].tolist()  # two words of row 0 beside those of row 8
        (16, [0, 32, 1, 33, 64, 96])

    Source: a vendor documents no order; the derivation is in the README beside this file.
    """
    if dtype not in (torch.float16, torch.bfloat16) or rows < 4 or columns < 16 or rows % 4 or columns % 16:
        raise LayoutError(
            f"the matrix is {dtype} {rows} × {columns}: it must be float16 or bfloat16, rows a multiple of 4 and "
            "columns of 16, so pad the weight."
        )
    probes = _Probes(compress, rows, columns, dtype, device)
    source = _source_of_nibbles(probes)
    found = source[source >= 0]
    seen = torch.zeros(probes.count, dtype=torch.bool, device=device).index_fill_(0, found.long(), True)
    if found.numel() != probes.count or not bool(seen.all()):
        raise LayoutError(
            f"compress shows {int(seen.sum())} of {probes.count} natural nibbles at {found.numel()} places: a layout "
            "can be learned only if each is found exactly once, so use the vendor's buffers as they are."
        )
    unit_bits, source = _in_largest_units(source)
    layout = LearnedLayout(rows, columns, unit_bits, source, _units(probes.constant_words(), unit_bits)[source < 0])
    for _ in range(_VERIFICATIONS):
        values, meta = probes.random_values(), probes.meta(probes.random_digits())
        verify_layout(layout, compress, unpack_rows(values, meta), values, meta)
    return layout


@torch.no_grad()
def verify_layout(layout: LearnedLayout, compress: Compressor, dense: Tensor, values: Tensor, meta: Tensor) -> None:
    """Raise unless packed rows in a layout are the buffer of the vendor's compressor, padding aside.

    Args:
        layout: On the device of the rest.
        compress: As in :func:`learn_layout`.
        dense: ``[R, C]``, exactly 2:4, no kept entry zero.
        values: ``[R, C/2]`` of it, in its dtype.
        meta: int16 ``[R, C/16]`` of it, natural order.

    Raises:
        LayoutError: If any byte differs.

    Example:
        >>> layout = LearnedLayout(1, 16, 16, torch.zeros(1).int(), torch.zeros(0, dtype=torch.int16))
        >>> dense = torch.tensor([[1.0, 2, 0, 0] * 4]).half()
        >>> values, meta = dense[dense != 0].view(1, 8), torch.tensor([[0x4444]], dtype=torch.int16)
        >>> verify_layout(layout, lambda _: torch.cat([values, meta.view(torch.half)], 1), dense, values, meta)
    """
    tail = _read_tail(compress, dense, values)
    expected = torch.empty(layout.source.numel() * layout.unit_bits // 16, dtype=torch.int16, device=tail.device)
    layout.arrange_(meta, expected)
    if expected.shape != tail.shape:
        raise LayoutError(f"compress put {tail.numel()} words behind the values: the layout has {expected.numel()}.")
    differs = _units(expected, layout.unit_bits) != _units(tail, layout.unit_bits)
    wrong = int((differs & (layout.source >= 0)).sum())
    if wrong:
        raise LayoutError(
            f"compress disagrees with the layout at {wrong} of {layout.source.numel()} places: they must all agree, so "
            "use the vendor's buffers as they are."
        )


class _Probes:
    """Matrices with chosen metadata, and what a compressor makes of them."""

    def __init__(self, compress: Compressor, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.compress, self.shape, self.dtype = compress, (rows, columns), dtype
        self.count = rows * columns // 4  # nibbles
        self.numbers = torch.arange(self.count, dtype=torch.int32, device=device)
        self.generator = torch.Generator(device).manual_seed(0)  # the training's own stays as it is
        self.values = self.random_values()
        self.first: Tensor | None = None  # nibbles of the first buffer
        self.varied: Tensor | None = None  # where another buffer had another one
        table = torch.full((16,), _NO_DIGIT, dtype=torch.uint8, device=device)
        self.nibble_of_digit = torch.tensor(_NIBBLES, dtype=torch.int16, device=device)
        self.digit_of_nibble = table.index_copy_(
            0, self.nibble_of_digit.long(), torch.arange(6, dtype=torch.uint8, device=device)
        )

    def random_values(self) -> Tensor:
        shape = (self.shape[0], self.shape[1] // 2)
        whole = self._random(-255, 255, shape, torch.int16)
        return (whole + (whole >= 0)).to(self.dtype)  # exact in both dtypes, and never zero

    def random_digits(self) -> Tensor:
        return self._random(0, 6, (self.count,), torch.int32)

    def _random(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, dtype=dtype, device=self.numbers.device, generator=self.generator)

    def meta(self, digits: Tensor) -> Tensor:
        nibbles = self.nibble_of_digit.index_select(0, digits).view(-1, 4)
        words = nibbles[:, 0] | nibbles[:, 1] << 4 | nibbles[:, 2] << 8 | nibbles[:, 3] << 12
        return words.view(self.shape[0], -1)

    def digits_seen(self, digits: Tensor) -> Tensor:
        """Return the digit at every place behind the values, for natural nibbles that spell ``digits``."""
        tail = _read_tail(self.compress, unpack_rows(self.values, self.meta(digits)), self.values)
        nibbles = _units(tail, 4)
        if self.first is None or self.varied is None:
            self.first, self.varied = nibbles, torch.zeros_like(nibbles, dtype=torch.bool)
        elif nibbles.shape != self.first.shape:
            raise LayoutError(
                f"compress put {tail.numel()} words behind the values, and {self.first.numel() // 4} the first time: "
                "it must always be as many."
            )
        else:
            self.varied |= nibbles != self.first
        return self.digit_of_nibble.index_select(0, nibbles.int())

    def constant_words(self) -> Tensor:
        """Return what never changed behind the values, zero elsewhere."""
        assert self.first is not None
        assert self.varied is not None
        pairs = self.first.masked_fill(self.varied, 0).view(-1, 2)
        return (pairs[:, 0] | pairs[:, 1] << 4).view(torch.int16)


def _source_of_nibbles(probes: _Probes) -> Tensor:
    """Return for every nibble behind the values the number of the natural one that lies there, or -1."""
    source, power = torch.zeros(0), 1
    while power < probes.count or power == 1:
        seen = probes.digits_seen(probes.numbers // power % 6)
        if power == 1:
            source = torch.zeros(seen.numel(), dtype=torch.int32, device=seen.device)
        invalid = (source < 0) | (seen == _NO_DIGIT)
        source.add_(seen, alpha=power).masked_fill_(invalid, -1)
        power *= 6
    source.masked_fill_(source >= probes.count, -1)
    for check in range(_MOST_CHECKS):
        # the first check moves every digit on, which no constant does
        digits = probes.random_digits() if check else (probes.numbers + 1) % 6
        seen = probes.digits_seen(digits)
        expected = digits.index_select(0, source.clamp(min=0))
        source.masked_fill_(expected != seen, -1)
        if check and int((source >= 0).sum()) <= probes.count:
            break
    return source


def _in_largest_units(source: Tensor) -> tuple[int, Tensor]:
    """Return the bits of the largest unit that is moved in one piece, and the source of every unit."""
    for nibbles in (4, 2):
        groups = source.view(-1, nibbles)
        first, steps = groups[:, :1], torch.arange(nibbles, dtype=torch.int32, device=source.device)
        moved = (groups == first + steps).all(1, keepdim=True)  # in a permutation, such runs are aligned
        if bool((moved | (groups < 0).all(1, keepdim=True)).all()):
            return 4 * nibbles, torch.div(first.flatten(), nibbles, rounding_mode="floor")
    return 4, source


def _read_tail(compress: Compressor, dense: Tensor, values: Tensor) -> Tensor:
    """Compress and return the words behind the values, which must be these."""
    buffer = compress(dense)
    least = dense.numel() * 9 // 16
    fits = buffer.dtype.itemsize == 2 and buffer.numel() >= least and buffer.is_contiguous()
    if not fits or buffer.device != dense.device:
        raise LayoutError(
            f"compress returned {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}: it must return at least "
            f"{least} contiguous 16-bit elements on {dense.device}, values and then metadata."
        )
    words = buffer.view(-1).view(torch.int16)
    wrong = int((words[: values.numel()] != values.view(-1).view(torch.int16)).sum())
    if wrong:
        raise LayoutError(
            f"compress put other values at {wrong} of the first {values.numel()} places: kept values must come first, "
            "row by row, so use the vendor's buffers as they are."
        )
    return words[values.numel() :]


def _units(words: Tensor, bits: int) -> Tensor:
    """Return int16 words as words, as bytes or as nibbles, from bit 0 up."""
    if bits == 16:
        return words
    whole = words.view(torch.uint8)
    return whole if bits == 8 else torch.stack([whole & 0xF, whole >> 4], dim=-1).flatten()
