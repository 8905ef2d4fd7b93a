"""Problems and choices: what is to be multiplied, and who does it."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

Product = Literal["forward", "input_gradient", "weight_gradient"]


@dataclass(frozen=True)
class Problem:
    """One of a layer's products, as far as its speed depends on it.

    Args:
        product: ``"forward"``: X·Wᵀ; ``"input_gradient"``: dY·W; ``"weight_gradient"``: dYᵀ·X.
        shape: ``(O, I)`` of the weight.
        tokens: Rows of X; problems share a measurement with all of the same :func:`bucket`.
        dtype: In which the product is computed.
        bias: Whether a bias is added.

    Example:
        >>> Problem("forward", (4096, 1024), 3000, torch.bfloat16).key
        'forward 4096x1024 bfloat16 4096 tokens'
    """

    product: Product
    shape: tuple[int, int]
    tokens: int
    dtype: torch.dtype
    bias: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """``(R, C)`` of the sparse operand."""
        rows, columns = self.shape
        if self.product == "weight_gradient":
            return rows, bucket(self.tokens)
        return (rows, columns) if self.product == "forward" else (columns, rows)

    @property
    def rows(self) -> int:
        """Rows of the dense operand, of the size that problems of a bucket are measured with."""
        return self.shape[1] if self.product == "weight_gradient" else bucket(self.tokens)

    @property
    def key(self) -> str:
        """How the problem is called in a table."""
        dtype = str(self.dtype).removeprefix("torch.")
        words = [self.product, f"{self.shape[0]}x{self.shape[1]}", dtype, f"{bucket(self.tokens)} tokens"]
        return " ".join([*words, "bias"] if self.bias else words)


@dataclass(frozen=True)
class Choice:
    """The choice for a product: a backend and one of its algorithms.

    Example:
        >>> str(Choice("cusparselt", "7")), Choice.parse("masked")
        ('cusparselt:7', Choice(backend='masked', algorithm=''))
    """

    backend: str
    algorithm: str = ""

    def __str__(self) -> str:
        return f"{self.backend}:{self.algorithm}" if self.algorithm else self.backend

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """Return the choice that ``str`` made this text of."""
        backend, _, algorithm = text.partition(":")
        return cls(backend, algorithm)


MASKED = Choice("masked")
SMALLEST_BUCKET = 64


@functools.lru_cache(maxsize=4096)
@functools.lru_cache(maxsize=4096)
def bucket(tokens: int) -> int:
    """Return the power of two, at least 64, that a number of tokens is rounded up to for measurements.

    Example:
        >>> [bucket(tokens) for tokens in (1, 64, 65, 8192)]
        [64, 64, 128, 8192]
    """
    return max(SMALLEST_BUCKET, 1 << max(tokens - 1, 0).bit_length())
