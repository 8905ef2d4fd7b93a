"""Criteria that need no statistics."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks.rules import INT, require
from .criterion import Criterion


@dataclass(frozen=True)
class Magnitude(Criterion):
    """Keep the largest ``|w|``.

    Example:
        >>> Magnitude().scores(torch.tensor([[-2.0, 1.0]]), layer="fc", clock=0).tolist()
        [[2.0, 1.0]]
    """

    name: ClassVar[str] = "magnitude"

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        """Return ``|weight|``."""
        return weight.detach().abs()


@dataclass(frozen=True)
class Random(Criterion):
    """Keep a random valid pattern; the draw depends on (seed, layer, clock) alone.

    Args:
        seed: Any integer.

    Raises:
        ValueError: If it is none.

    Example:
        >>> draw = Random(seed=1).scores(torch.zeros(4, 4), layer="fc", clock=0)
        >>> torch.equal(draw, Random(seed=1).scores(torch.ones(4, 4), layer="fc", clock=0))
        True
    """

    name: ClassVar[str] = "random"
    of_shape: ClassVar[bool] = True
    seed: int = 0

    def __post_init__(self) -> None:
        require("seed", self.seed, INT)

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        """Return uniform random numbers, drawn on the CPU so that every device sees the same."""
        key = zlib.crc32(f"{self.seed}/{layer}/{clock}".encode())
        generator = torch.Generator().manual_seed(key)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
