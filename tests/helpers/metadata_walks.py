"""Orders of metadata as walks through memory, written down from their descriptions."""

from collections.abc import Callable, Iterator

from sparsetrain.kernels.metadata_order import Order

Walk = Iterator[tuple[int, int]]


def natural(rows: int, words: int) -> Walk:
    return ((row, word) for row in range(rows) for word in range(words))


def block_of_8x(top: int, left: int) -> Walk:
    for row in range(8):
        for lower in (0, 16):
            for word in (0, 1):
                yield top + row + lower, left + word
                yield top + row + lower + 8, left + word


def cutlass(rows: int, words: int) -> Walk:
    for left in range(0, words, 2):
        for top in range(0, rows, 32):
            yield from block_of_8x(top, left)


def cusparselt_sm80(rows: int, words: int) -> Walk:
    for left in range(0, words, 4):
        for top in range(0, rows, 128):
            for right in (0, 2):
                for down in (0, 32, 64, 96):
                    yield from block_of_8x(top + down, left + right)


def cutlass_sm90(blocks: int, rows: int, words: int) -> Walk:
    """The strides of an atom, from the slowest to the fastest; atoms down the rows first."""
    for left in range(0, words, 2 * blocks):
        for top in range(0, rows, 64):
            for sixteen in range(4):
                for parity in range(2):
                    for row in range(8):
                        for block in range(blocks):
                            for eight in range(2):
                                yield top + 16 * sixteen + 8 * eight + row, left + 2 * block + parity


WALKS: dict[Order, Callable[[int, int], Walk]] = {
    Order.NATURAL: natural,
    Order.CUTLASS: cutlass,
    Order.CUSPARSELT_SM80: cusparselt_sm80,
    Order.CUTLASS_SM90_1: lambda rows, words: cutlass_sm90(1, rows, words),
    Order.CUTLASS_SM90_2: lambda rows, words: cutlass_sm90(2, rows, words),
    Order.CUTLASS_SM90_4: lambda rows, words: cutlass_sm90(4, rows, words),
}
