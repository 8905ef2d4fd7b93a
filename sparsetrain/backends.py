"""Backends: who computes a masked layer's forward product and input gradient."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.tile_codes.reference import unpack_codes


class Backend(Protocol):
    """The two products with the masked weight; the weight gradient is dense and needs no backend."""

    name: str

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Say in one sentence why a weight ``[O, I]`` cannot run here, or return None."""

    def forward(self, input: Tensor, weight: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``Y = X·(W⊙M)ᵀ + b``: ``[..., I]`` to ``[..., O]``."""

    def input_gradient(self, output_gradient: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
        """Return ``dX = dY·(W⊙M)``: ``[..., O]`` to ``[..., I]``."""


class MaskedBackend:
    """Dense products with ``W⊙M``: runs everywhere and defines what every other backend must compute."""

    name = "masked"

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        """Return None: this backend runs everywhere."""
        return None

    def forward(self, input: Tensor, weight: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``Y = X·(W⊙M)ᵀ + b``."""
        return F.linear(input, _masked(weight, codes), bias)

    def input_gradient(self, output_gradient: Tensor, weight: Tensor, codes: Tensor) -> Tensor:
        """Return ``dX = dY·(W⊙M)``."""
        return output_gradient.matmul(_masked(weight, codes))


BACKENDS: dict[str, Backend] = {"masked": MaskedBackend()}


def resolve_backend(name: str) -> Backend:
    """Return the backend of that name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> resolve_backend("masked").why_not(torch.device("cpu"), torch.float32, (8, 8)) is None
        True
    """
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: it must be one of {sorted(BACKENDS)}.")
    return BACKENDS[name]


def _masked(weight: Tensor, codes: Tensor) -> Tensor:
    return weight.masked_fill(~unpack_codes(codes), 0)
