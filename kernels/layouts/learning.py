"""Learning where a vendor's compressor puts metadata, from probes whose metadata says where it came from."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..pack import unpack_rows
from .learned_layout import LayoutError, LearnedLayout

Compressor = Callable[[Tensor], Tensor]
"""Of an exactly 2:4 float16 or bfloat16 ``[R, C]``: one contiguous buffer of any shape, values first, then metadata."""

_NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)  # i0 | i1 << 2 of the six pairs: a digit of base 6
_NO_DIGIT = 255
_MOST_CHECKS = 16  # garbage passes one with probability 1/6
_VERIFICATIONS = 3


@torch.no_grad()
def learn_layout(
    compress: Compressor, rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> LearnedLayout:
    """Learn the order of a vendor's metadata by compressing matrices whose nibbles spell their own number.

    Args:
        compress: Of an exactly 2:4 ``[R, C]``: R·C/2 values row by row, then metadata in any order, with any padding.
        rows: R, a multiple of 4.
        columns: C, a multiple of 16.
        dtype: Of the matrices: float16 or bfloat16.
        device: Of the matrices.

    Returns:
        The order in its largest unit: words, bytes or nibbles; three random matrices were compressed as it says.

    Raises:
        LayoutError: If sizes or dtype do not fit, values are not first and natural, some nibble ``i0 | i1 << 2`` is not
            found exactly once, or a random matrix is compressed otherwise.

    Example:
        >>> from sparsetrain.kernels.layouts import to_cutlass
        >>> from sparsetrain.kernels.pack.reference import pack_rows
        >>> def compress(matrix):
        ...     values, meta = pack_rows(matrix, matrix != 0)
        ...     return torch.cat([values.flatten(), to_cutlass(meta).flatten().view(matrix.dtype)])
        >>> layout = learn_layout(compress, 32, 64, torch.float16, torch.device("cpu"))
        >>> layout.unit_bits, layout.source[:6].tolist()  # two words of row 0 beside those of row 8
        (16, [0, 32, 1, 33, 64, 96])
    """
    probes = _Probes(compress, rows, columns, dtype, device)
    source = _source_of_nibbles(probes)
    _require_permutation(source, probes.count)
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
        if dtype not in (torch.float16, torch.bfloat16) or rows < 4 or columns < 16 or rows % 4 or columns % 16:
            raise LayoutError(
                f"the matrix is {dtype} {rows} × {columns}: it must be float16 or bfloat16, rows a multiple of 4 and "
                "columns of 16, so pad the weight."
            )
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


def _require_permutation(source: Tensor, count: int) -> None:
    """Raise unless every one of the natural nibbles lies at exactly one place."""
    found = source[source >= 0]
    seen = torch.zeros(count, dtype=torch.bool, device=source.device).index_fill_(0, found.long(), True)
    if found.numel() != count or not bool(seen.all()):
        raise LayoutError(
            f"compress shows {int(seen.sum())} of {count} natural nibbles at {found.numel()} places: a layout can be "
            "learned only if each is found exactly once, so use the vendor's buffers as they are."
        )


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
