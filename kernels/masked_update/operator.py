"""Masked updates of several tensors as torch operators: Triton on CUDA, the reference elsewhere."""

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..dtypes import KERNEL_DTYPES
from ..launch import Known, kernels_now, relaunched
from ..plan import Plans, layout_of, strides_of
from .reference import add_masked_decay_, apply_mask_


@torch.library.custom_op("sparsetrain::add_masked_decays_", mutates_args={"gradients"})
def add_masked_decays_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    decay: Tensor,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
) -> None:
    """Add ``decay * (1 - mask) * weight`` to several gradients in place, without a mask in memory.

    What is small beside a 16-bit gradient would be lost in rounding it to the nearest number. Such sums are made in
    float32 and rounded up or down at random, with the probabilities that make their mean right.

    Args:
        gradients: ``[O, I]`` each, any strides; changed in place.
        weights: The master weights, ``[O, I]`` each.
        codes: int16 ``[O/4, I/4]`` each, contiguous.
        decay: λ, one element, on the gradients' device; it is not read on the host.
        numbers: Of the layers, one each; with ``clock`` the counter of the random numbers, so that there is no
            generator to save. None for zeros.
        clock: Of the step.

    Raises:
        ValueError: If the lists or their entries do not fit; nothing is changed then.

    Example:
        >>> gradient, codes = torch.zeros(4, 4), torch.full((1, 1), 0x000F, dtype=torch.int16)
        >>> add_masked_decays_([gradient], [torch.ones(4, 4)], [codes], torch.tensor(0.5))
        >>> gradient.sum(dim=1).tolist()
        [0.0, 2.0, 2.0, 2.0]

    Source: Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", arXiv 2404.01847, masked decay on
    gradients.
    """
    _check(codes, gradients=gradients, weights=weights)
    for gradient, weight, code, number in zip(gradients, weights, codes, _numbers(numbers, codes), strict=True):
        add_masked_decay_(gradient, weight, code, decay, number, clock)


@torch.library.custom_op("sparsetrain::apply_masks_", mutates_args={"tensors"})
def apply_masks_(tensors: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    """Write zeros into the pruned entries of several tensors in place.

    Args:
        tensors: ``[O, I]`` each, any dtype and strides; changed in place. What is pruned becomes +0, NaN included.
        codes: int16 ``[O/4, I/4]`` each, contiguous.

    Raises:
        ValueError: If the lists or their entries do not fit; nothing is changed then.

    Example:
        >>> tensor = torch.ones(4, 4)
        >>> apply_masks_([tensor], [torch.full((1, 1), 0x000F, dtype=torch.int16)])
        >>> tensor.sum().item()
        4.0
    """
    _check(codes, tensors=tensors)
    for tensor, code in zip(tensors, codes, strict=True):
        apply_mask_(tensor, code)


@add_masked_decays_.register_fake
def _(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    decay: Tensor,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
) -> None:
    _check(codes, gradients=gradients, weights=weights)
    _numbers(numbers, codes)


@apply_masks_.register_fake
def _(tensors: Sequence[Tensor], codes: Sequence[Tensor]) -> None:
    _check(codes, tensors=tensors)


@add_masked_decays_.register_kernel("cuda")
def _decay_on_cuda(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    decay: Tensor,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
    known: Known | None = None,
) -> None:
    from .triton_kernel import decay_in_place

    layouts = layout_of(gradients, weights, codes) if known is None else _layouts(known, gradients)
    taken, plan = DECAYS.of(layouts, lambda: _planned(codes, gradients=gradients, weights=weights))
    numbers = _numbers(numbers, codes)
    if len(taken) < len(codes):
        for position in sorted({*range(len(codes))}.difference(taken)):
            add_masked_decay_(gradients[position], weights[position], codes[position], decay, numbers[position], clock)
        gradients, weights, codes = ([column[i] for i in taken] for column in (gradients, weights, codes))
        numbers, known = [numbers[i] for i in taken], None
    if taken:
        decay_in_place(gradients, weights, codes, decay.to(torch.float32), numbers, clock, plan, known)


@apply_masks_.register_kernel("cuda")
def _mask_on_cuda(tensors: Sequence[Tensor], codes: Sequence[Tensor], known: Known | None = None) -> None:
    from .triton_kernel import mask_in_place

    layouts = layout_of(tensors, codes) if known is None else _layouts(known, tensors)
    taken, plan = MASKINGS.of(layouts, lambda: _planned(codes, tensors=tensors))
    if len(taken) < len(codes):
        for position in {*range(len(codes))}.difference(taken):
            apply_mask_(tensors[position], codes[position])
        tensors, codes, known = [tensors[i] for i in taken], [codes[i] for i in taken], None
    if taken:
        mask_in_place(tensors, codes, plan, known)


_DTYPE = attrgetter("dtype")

DECAYS: Plans[tuple[list[int], Any]] = Plans()
MASKINGS: Plans[tuple[list[int], Any]] = Plans()


def _layouts(known: Known, targets: Sequence[Tensor]) -> Hashable:
    """Return what plans are made from; a gradient has its weight's size and device."""
    if not known.moving:
        return known.layouts, None
    return known.layouts, strides_of(targets), tuple(map(_DTYPE, targets))


def _planned(codes: Sequence[Tensor], **columns: Sequence[Tensor]) -> tuple[list[int], Any]:
    """Check tensors, and return the positions of those that the kernel takes, and the plan of its launches."""
    from .triton_kernel import plan_of

    _check(codes, **columns)
    first, last = next(iter(columns.values())), [*columns.values()][-1]
    taken = [i for i in range(len(codes)) if _suits_kernel(first[i]) and _suits_kernel(last[i])]
    return taken, plan_of(*([column[i] for i in taken] for column in (first, last, codes)))


NOW: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {"cuda": (_decay_on_cuda, _mask_on_cuda)}
"""By type of device, what the two functions below call; elsewhere the operators."""


def add_masked_decays_now_(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    codes: Sequence[Tensor],
    decay: Tensor,
    numbers: Sequence[int] | None = None,
    clock: int = 0,
    known: Known | None = None,
) -> None:
    """Do what :func:`add_masked_decays_` does; eager execution spares the dispatcher, which looks at every tensor.

    Args:
        gradients: As there, and so are the others.
        weights: See there.
        codes: See there.
        decay: See there.
        numbers: See there.
        clock: See there.
        known: Of weights and codes, and of the gradients too unless they are moving; those are gradients of these
            weights, so that their strides and dtypes are all that is looked at. None to look at everything.

    Example:
        >>> add_masked_decays_now_([], [], [], torch.tensor(0.5))
    """
    kernels = kernels_now(NOW, known, gradients, weights, codes)
    if kernels is None:
        add_masked_decays_(gradients, weights, codes, decay, numbers, clock)
    else:
        kernels[0](gradients, weights, codes, decay, numbers, clock, known)
        torch.autograd.graph.increment_version(gradients)


def apply_masks_now_(tensors: Sequence[Tensor], codes: Sequence[Tensor], known: Known | None = None) -> None:
    """Do what :func:`apply_masks_` does; eager execution spares the dispatcher, which looks at every tensor.

    Args:
        tensors: As there.
        codes: See there.
        known: As in :func:`add_masked_decays_now_`.

    Example:
        >>> apply_masks_now_([], [])
    """
    kernels = kernels_now(NOW, known, tensors, codes)
    if kernels is None:
        apply_masks_(tensors, codes)
    else:
        if not relaunched(known, codes[0]):
            kernels[1](tensors, codes, known)
        torch.autograd.graph.increment_version(tensors)


def _suits_kernel(tensor: Tensor) -> bool:
    return tensor.dtype in KERNEL_DTYPES and tensor.stride(1) == 1 and tensor.numel() > 0


def _numbers(numbers: Sequence[int] | None, codes: Sequence[Tensor]) -> Sequence[int]:
    if numbers is not None and len(numbers) != len(codes):
        raise ValueError(f"numbers has {len(numbers)} entries but codes has {len(codes)}: pass one number for each.")
    return [0] * len(codes) if numbers is None else numbers


def _check(codes: Sequence[Tensor], **columns: Sequence[Tensor]) -> None:
    for name, column in columns.items():
        if len(column) != len(codes):
            raise ValueError(f"{name} has {len(column)} tensors but codes has {len(codes)}: pass one codes for each.")
    for position, code in enumerate(codes):
        if code.dtype is not torch.int16 or code.dim() != 2 or not code.is_contiguous():
            raise ValueError(
                f"codes[{position}] is {code.dtype} {tuple(code.shape)}: it must be a contiguous int16 matrix."
            )
        rows, tiles = code.shape
        shape, place = (4 * rows, 4 * tiles), code.device
        for name, column in columns.items():
            tensor = column[position]
            if tensor.shape != shape or tensor.device != place:
                raise ValueError(
                    f"{name}[{position}] is {tuple(tensor.shape)} on {tensor.device}: with codes {tuple(code.shape)} "
                    f"on {place} it must be {shape} on {place}."
                )
