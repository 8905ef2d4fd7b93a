"""Statistics as a torch operator: Triton on CUDA, ``cpu.py`` elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import KERNEL_DTYPES
from .cpu import measure
from .reference import FIELDS


@torch.library.custom_op("sparsetrain::tile_statistics", mutates_args=())
def tile_statistics(weights: Sequence[Tensor], codes: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """Measure what masks keep and prune of several weights, without waiting for the device.

    Args:
        weights: ``[O, I]`` each, any floating dtype and strides; on one device.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        previous: Earlier codes each, to count the entries that changed; or an empty list, which counts none.

    Returns:
        float64 ``[weights, 6]`` on their device: ``Σ|w|`` of kept and of pruned finite entries, kept entries, all
        entries, non-finite entries, and entries whose mask changed.

    Raises:
        ValueError: If the lists are empty or do not fit.

    Example:
        >>> codes = torch.full((1, 1), 0x000F, dtype=torch.int16)
        >>> tile_statistics([torch.ones(4, 4)], [codes], []).tolist()
        [[4.0, 12.0, 4.0, 16.0, 0.0, 0.0]]
    """
    _check(weights, codes, previous)
    earlier: Sequence[Tensor | None] = previous or [None] * len(weights)
    return torch.stack([measure(*entry) for entry in zip(weights, codes, earlier, strict=True)])


@tile_statistics.register_fake
def _(weights: Sequence[Tensor], codes: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    _check(weights, codes, previous)
    return weights[0].new_empty(len(weights), len(FIELDS), dtype=torch.float64)


@tile_statistics.register_kernel("cuda")
def _(weights: Sequence[Tensor], codes: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    from .triton_kernel import partial_sums

    _check(weights, codes, previous)
    by_kernel = [i for i, weight in enumerate(weights) if weight.dtype in KERNEL_DTYPES and weight.numel()]
    statistics = weights[0].new_empty(len(by_kernel), len(FIELDS), dtype=torch.float64)
    if by_kernel:
        sources = [weights[i] if weights[i].stride(1) == 1 else weights[i].contiguous() for i in by_kernel]
        earlier = [previous[i] for i in by_kernel] if previous else []
        partial_sums(sources, [codes[i] for i in by_kernel], earlier, statistics)
    if len(by_kernel) == len(weights):
        return statistics
    measured = iter(statistics)
    others = set(range(len(weights))) - set(by_kernel)
    return torch.stack(
        [
            measure(weight, codes[i], previous[i] if previous else None) if i in others else next(measured)
            for i, weight in enumerate(weights)
        ]
    )


def _check(weights: Sequence[Tensor], codes: Sequence[Tensor], previous: Sequence[Tensor]) -> None:
    if not weights or len(codes) != len(weights) or len(previous) not in (0, len(weights)):
        raise ValueError(
            f"weights, codes and previous have {len(weights)}, {len(codes)} and {len(previous)} entries: pass at least "
            "one weight, one codes for each, and one previous for each or none."
        )
    for position, weight in enumerate(weights):
        shape = (weight.shape[0] // 4, weight.shape[-1] // 4)
        if weight.dim() != 2 or weight.shape[0] % 4 or weight.shape[1] % 4 or not weight.is_floating_point():
            raise ValueError(
                f"weights[{position}] is {weight.dtype} {tuple(weight.shape)}: it must be a floating-point matrix "
                "whose sizes are multiples of 4."
            )
        for name, column in (("codes", codes), ("previous", previous or codes)):
            code = column[position]
            if code.dtype != torch.int16 or tuple(code.shape) != shape or not code.is_contiguous():
                raise ValueError(
                    f"{name}[{position}] is {code.dtype} {tuple(code.shape)}: it must be contiguous torch.int16 "
                    f"{shape}."
                )
            if code.device != weights[0].device or weight.device != weights[0].device:
                raise ValueError(
                    f"{name}[{position}] is on {code.device}, its weight on {weight.device}: all must be on "
                    f"{weights[0].device}, as the first weight is."
                )
