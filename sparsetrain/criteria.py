"""Criteria: how entries of a weight are scored; the mask keeps what scores highest."""

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class Criterion:
    """What ranks the entries of a weight when masks are searched.

    Subclass it, implement :meth:`scores`, and pass an instance as ``Method(criterion=...)``. A criterion that gathers
    statistics keeps them in :meth:`state_dict`, as plain numbers and tensors, so that a run resumes bit for bit.
    """

    name: ClassVar[str] = "custom"

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        """Score a weight.

        Args:
            weight: ``[O, I]``, the master.
            layer: The layer's name in the model.
            clock: Successful optimizer steps so far.

        Returns:
            ``[O, I]``, floating point; larger is kept.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain numbers and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""


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

    Example:
        >>> draw = Random(seed=1).scores(torch.zeros(4, 4), layer="fc", clock=0)
        >>> torch.equal(draw, Random(seed=1).scores(torch.ones(4, 4), layer="fc", clock=0))
        True
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def scores(self, weight: Tensor, *, layer: str, clock: int) -> Tensor:
        """Return uniform random numbers, drawn on the CPU so that every device sees the same."""
        key = zlib.crc32(f"{self.seed}/{layer}/{clock}".encode())
        generator = torch.Generator().manual_seed(key)
        return torch.rand(weight.shape, generator=generator).to(weight.device)


CRITERIA: dict[str, type[Criterion]] = {criterion.name: criterion for criterion in (Magnitude, Random)}


def resolve_criterion(criterion: str | Criterion) -> Criterion:
    """Return a criterion from its name, or the criterion itself.

    Raises:
        ValueError: If no criterion has that name.

    Example:
        >>> resolve_criterion("magnitude")
        Magnitude()
    """
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: it must be one of {sorted(CRITERIA)} or a Criterion instance.")
    return CRITERIA[criterion]()
