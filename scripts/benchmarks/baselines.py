"""What there was before: exact search by enumeration, and the operators of torch and cuSPARSELt."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain import transposable_mask
from sparsetrain.kernels.mask_search.reference import patterns
from sparsetrain.kernels.torch_internals import cslt_compress, semi_structured_tile

from .measure import milliseconds, quantiles

CHUNKS = [1 << power for power in range(12, 21)]  # tiles of one matrix product


def matmul90(scores: Tensor, chunk: int) -> Tensor:
    """The usual exact search: ``(tiles × 16) · (16 × 90)`` in chunks, argmax, gather."""
    rows, columns = scores.shape
    tiles = scores.view(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)
    grids = _grids(scores.device)
    best = torch.cat([(part @ grids.T).argmax(1) for part in tiles.split(chunk)])
    mask = grids.bool()[best]
    return mask.view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)


def best_chunk(scores: Tensor) -> int:
    """Return the chunk with which matmul-90 is fastest here."""
    trials = {chunk: quantiles(milliseconds(lambda chunk=chunk: matmul90(scores, chunk), 3))[1] for chunk in CHUNKS}
    return min(trials, key=trials.__getitem__)


def apex_style_argmax(scores: Tensor) -> Tensor:
    """The whole-matrix form of the enumeration, as apex has it, on shapes that fit together."""
    return matmul90(scores, scores.numel() // 16)


@dataclass(frozen=True)
class Baseline:
    """An operator of torch, called through ``torch.ops.aten`` on what ``prepare`` makes of a weight."""

    kernel: str
    provider: str
    prepare: Callable[[Tensor], Any]
    call: Callable[[Any], object]
    bytes_per_entry: float


def _tile(weight: Tensor) -> object:
    return semi_structured_tile(weight, "largest_abs_values_greedy", True)


def _masked(weight: Tensor) -> tuple[Tensor, Tensor]:
    masked = weight * transposable_mask(weight.abs())
    return masked, masked.t().contiguous()


def _compress(both: tuple[Tensor, Tensor]) -> object:
    return [cslt_compress(masked) for masked in both]


BASELINES = (
    Baseline("search and pack", "torch tile operator (greedy)", lambda weight: weight, _tile, 2 + 1 / 8 + 2.25),
    Baseline("pack", "cuSPARSELt compress of W and Wᵀ", _masked, _compress, 4 + 2.25),
)


@functools.lru_cache(maxsize=4)
def _grids(device: torch.device) -> Tensor:
    return patterns(2).view(90, 16).to(device, torch.float32)
