"""The unbiased 2:4 estimate as a torch operator: Triton on CUDA, the reference elsewhere."""

import torch
from torch import Tensor

from ..dtypes import KERNEL_DTYPES
from . import reference


@torch.library.custom_op("sparsetrain::mvue", mutates_args=())
def mvue(gradient: Tensor, counter: Tensor, seed: int, layer: int, estimator: str = "exact") -> tuple[Tensor, Tensor]:
    """Estimate a gradient by two of every four consecutive tokens, unbiased, as the packed operand of its transpose.

    The draws are a function of the seed, the layer, the counter and a value's place in the gradient, so they can be
    repeated. The counter is a tensor, so that a compiled or captured step draws again.

    Args:
        gradient: ``[T, O]`` in float32, float16 or bfloat16, any strides; T a multiple of 4.
        counter: int64 ``[2]`` on the gradient's device: the clock (optimizer steps) and the micro-batch. The low 32
            bits of the first and the low 31 bits of the second count.
        seed: 64 bits.
        layer: From 0 to 2^31 - 1; another layer draws other numbers.
        estimator: ``"exact"``, the smallest variance there is, or ``"two_draw"``, two draws without replacement.

    Returns:
        ``values [O, T/2]`` in the gradient's dtype, and ``meta`` int16 ``[O, ceil(T/16)]``: a nibble ``i0 | i1 << 2``
        for each of four fours of tokens, from bit 0 up; zero where no tokens are left. Values beyond the range of the
        dtype become infinite, and a group of four with a NaN or infinite entry has a NaN or infinite value.

    Raises:
        ValueError: If a shape, dtype, device, layer or estimator does not fit.

    Example:
        >>> counter = torch.tensor([7, 0])
        >>> values, meta = mvue(torch.randn(32, 5), counter, seed=1, layer=0)
        >>> values.shape, meta.shape
        (torch.Size([5, 16]), torch.Size([5, 2]))

    Source: Chmiel et al. 2022, arXiv 2203.10991; the derivation is in this folder's README.
    """
    _check(gradient, counter, layer, estimator)
    return reference.estimate(gradient, counter, seed, layer, estimator)


@mvue.register_fake
def _(gradient: Tensor, counter: Tensor, seed: int, layer: int, estimator: str = "exact") -> tuple[Tensor, Tensor]:
    _check(gradient, counter, layer, estimator)
    return _empty(gradient)


@mvue.register_kernel("cuda")
def _(gradient: Tensor, counter: Tensor, seed: int, layer: int, estimator: str = "exact") -> tuple[Tensor, Tensor]:
    from .triton_kernel import estimate_into

    _check(gradient, counter, layer, estimator)
    values, meta = _empty(gradient)
    if gradient.numel():
        source = gradient if gradient.stride(1) == 1 else gradient.contiguous()
        estimate_into(source, counter.contiguous(), seed, layer, estimator, values, meta)
    return values, meta


def _empty(gradient: Tensor) -> tuple[Tensor, Tensor]:
    tokens, features = gradient.shape
    values = gradient.new_empty(features, tokens // 2)
    return values, gradient.new_empty(features, -(-tokens // 16), dtype=torch.int16)


def _check(gradient: Tensor, counter: Tensor, layer: int, estimator: str) -> None:
    if gradient.dim() != 2 or gradient.shape[0] % 4 or gradient.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"gradient is {gradient.dtype} {tuple(gradient.shape)}: it must be a float32, float16 or bfloat16 matrix "
            "whose rows are a multiple of 4, so convert it or pad the tokens with zeros."
        )
    if -(-gradient.shape[0] // 16) * gradient.shape[1] > 2**32:
        raise ValueError(
            f"gradient is {tuple(gradient.shape)}: it may have at most 2^32 groups of 16 tokens and one feature, so "
            "split it."
        )
    if counter.dtype != torch.int64 or tuple(counter.shape) != (2,) or counter.device != gradient.device:
        raise ValueError(
            f"counter is {counter.dtype} {tuple(counter.shape)} on {counter.device}: it must be torch.int64 (2,) on "
            f"{gradient.device}, the clock and the micro-batch."
        )
    if not 0 <= layer < 2**31:
        raise ValueError(f"layer is {layer}: it must be from 0 to 2^31 - 1, so number the layers from 0.")
    if estimator not in reference.ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}: choose one of {', '.join(map(repr, reference.ESTIMATORS))}.")
