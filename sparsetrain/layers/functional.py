"""``sparse_linear``: a linear layer with a masked weight, as a function."""

from typing import cast

import torch
from torch import Tensor

from ..backends import resolve_backend
from ..kernels.torch_internals import is_transformed
from ..masks.gradient_rules import GradientRule, resolve_gradient_rule
from ..matmul.autocast import as_autocast
from ..matmul.choices import backend_on
from ..matmul.linear_function import LinearSpec, SparseLinearFunction
from ..matmul.transforms import transformed_linear


def sparse_linear(
    input: Tensor,
    weight: Tensor,
    codes: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: str | GradientRule = "ste",
    backend: str = "auto",
    transposable: bool = True,
    draws: Tensor | None = None,
    seed: int = 0,
    backward_codes: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer with the weight masked by tile codes; differentiable in input, weight and bias.

    Under autocast the operands are cast as ``torch.nn.functional.linear`` casts them.

    Args:
        input: ``[..., I]``.
        weight: ``[O, I]``, the dense master.
        codes: int16 ``[O/4, I/4]``; for a bool mask pass ``encode_tiles(mask)``.
        bias: ``[O]`` or None.
        gradient: Rule of the weight gradient: ``"ste"``, ``"masked"`` or ``scaled(kept, pruned)``.
        backend: As :func:`sparsetrain.sparsify_` takes it.
        transposable: Whether the mask is transposable; if not, and without ``backward_codes``, the input gradient is
            computed densely.
        draws: Counter of a random estimate, int64 ``[2]``: then the weight gradient is computed from an unbiased 2:4
            estimate of the output gradient, and the counter goes up by one in every backward.
        seed: Of the estimate.
        backward_codes: int16 ``[O/4, I/4]`` that keep two of every four along ``out_features``: then the input
            gradient's product sees what both codes keep.

    Returns:
        ``[..., O]``.

    Raises:
        ValueError: If the codes do not fit the weight, or a name is unknown.

    Example:
        >>> codes = torch.full((1, 1), 0xF, dtype=torch.int16)  # keeps the first of four rows
        >>> sparse_linear(torch.ones(4), torch.ones(4, 4), codes).tolist()
        [4.0, 0.0, 0.0, 0.0]

    Source: straight-through gradients as in SR-STE, arXiv 2102.04010; transposable masks make the input gradient
    sparse too, arXiv 2102.08124.
    """
    _check(input, weight, codes)
    rule = resolve_gradient_rule(gradient)
    device = input.device.type
    name = backend_on(device, resolve_backend(backend))
    if input.is_nested:
        name = "masked"
    if torch.is_autocast_enabled(device):
        input = as_autocast(input)
        if name == "masked":  # others read the master itself
            weight, bias = as_autocast(weight), None if bias is None else as_autocast(bias)
    elif name != "masked" and input.dtype != weight.dtype:
        raise ValueError(
            f"input is {input.dtype} but weight is {weight.dtype}: they must be alike outside of autocast, so cast one "
            "of them or use autocast."
        )
    if is_transformed():
        return transformed_linear(input, weight, codes, bias, backward_codes, rule)
    spec = LinearSpec(rule, name, name if transposable or backward_codes is not None else "masked", seed)
    result = SparseLinearFunction.apply(input, weight, codes, bias, draws, backward_codes, spec)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


def _check(input: Tensor, weight: Tensor, codes: Tensor) -> None:
    # a nested tensor has sizes, but no shape
    if weight.dim() != 2 or input.dim() == 0 or input.size(-1) != weight.size(1):
        raise ValueError(
            f"input is {tuple(input.shape)} and weight {tuple(weight.shape)}: they must be [..., I] and [O, I] "
            "with the same I."
        )
    expected = (weight.shape[0] // 4, weight.shape[1] // 4)
    if codes.dtype != torch.int16 or tuple(codes.shape) != expected:
        raise ValueError(
            f"codes is {codes.dtype} {tuple(codes.shape)} but weight is {tuple(weight.shape)}: "
            f"codes must be int16 {expected}, as encode_tiles(mask) gives."
        )
