"""``sparse_linear`` and ``SparseLinear``: a linear layer whose products see the masked weight."""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.fx import Proxy

from .autocast import as_autocast
from .backends import resolve_backend
from .estimated_gradient import estimated_weight_gradient
from .gradient_rules import GradientRule, resolve_gradient_rule
from .kernels.tile_codes.reference import unpack_codes
from .masked_layer import MaskedLayer, has_choice
from .operands import Execution
from .products import masked_product
from .tiles import require_tiles
from .transforms import as_constants, as_leaf, is_transformed, transformed_linear


class Rules(NamedTuple):
    """What the autograd function knows beside its tensors: the gradient rule, who computes what, the seed of draws."""

    gradient: GradientRule
    forward: str
    input_gradient: str
    seed: int


class SparseLinearFunction(torch.autograd.Function):
    """``Y = X·(W⊙M)ᵀ + b``, ``dX = dY·(W⊙M)``, ``dW`` by a gradient rule, ``db = ΣdY``."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        codes: Tensor,
        bias: Tensor | None,
        draws: Tensor | None,
        backward_codes: Tensor | None,
        rules: Rules,
    ) -> Tensor:
        """Compute the forward product."""
        if rules.forward == "masked":
            return F.linear(input, _masked(weight, codes), bias)
        rows = input.reshape(-1, weight.shape[1])
        result = masked_product(rows, weight, codes, bias, False, rules.forward, backward_codes)
        return result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the two gradient products need; the masked weight is not among it."""
        input, weight, codes, bias, draws, backward_codes, rules = inputs
        ctx.save_for_backward(input, weight, codes, backward_codes)
        ctx.draws, ctx.rules, ctx.bias_dtype = draws, rules, None if bias is None else bias.dtype  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for."""
        (output_gradient,) = cast(tuple[Tensor], output_gradients)
        input, weight, codes, backward_codes = ctx.saved_tensors
        rules: Rules = ctx.rules
        if rules.forward != "masked" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"backend is {rules.forward!r} and a gradient of gradients is asked for (create_graph=True): only "
                "'masked' has one, so use backend='masked'."
            )
        input_gradient = weight_gradient = bias_gradient = None
        rows = output_gradient.reshape(-1, weight.shape[0])  # [tokens, O]
        if ctx.needs_input_grad[0]:
            if rules.input_gradient == "masked":
                kept = codes if backward_codes is None else codes & backward_codes
                input_gradient = output_gradient.matmul(_masked(weight, kept).to(output_gradient.dtype))
            else:
                product = masked_product(rows, weight, codes, None, True, rules.input_gradient, backward_codes)
                input_gradient = product.view(input.shape)
        if ctx.needs_input_grad[1]:
            tokens = input.reshape(-1, weight.shape[1])
            if ctx.draws is None:
                whole = rows.t().matmul(tokens)
            else:
                whole = estimated_weight_gradient(rows, tokens, codes, ctx.draws, rules.seed, rules.forward)
            weight_gradient = rules.gradient.apply(whole.to(weight.dtype), codes)
        if ctx.needs_input_grad[3]:
            bias_gradient = rows.sum(0).to(ctx.bias_dtype)
        return input_gradient, weight_gradient, None, bias_gradient, None, None, None


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
        backend: Who computes the products with the masked weight: a backend's name, or ``"auto"``: the fastest of
            those that give right numbers here, by measurement; without a GPU that is ``"masked"``.
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
    rule = resolve_gradient_rule(gradient)
    name = resolve_backend(backend)
    device = input.device.type
    if (name == "auto" and not has_choice(device)) or input.is_nested:
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
    rules = Rules(rule, name, name if transposable or backward_codes is not None else "masked", seed)
    result = SparseLinearFunction.apply(input, weight, codes, bias, draws, backward_codes, rules)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


class SparseLinear(MaskedLayer, nn.Linear):
    """An ``nn.Linear`` with a mask: same parameters, same ``state_dict``, and tile codes beside them.

    Usually made in place by :func:`sparsetrain.sparsify_`. A forward never changes the mask.

    Args:
        in_features: I, a multiple of 4.
        out_features: O, a multiple of 4.
        bias: Whether there is a bias.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    Raises:
        ValueError: If a size is not a multiple of 4.

    Example:
        >>> layer = SparseLinear(8, 4)
        >>> layer.set_codes_(torch.full((1, 2), 0x3C3C, dtype=torch.int16))
        >>> layer.mask.sum().item(), sorted(layer.state_dict())
        (16, ['bias', 'weight'])
    """

    dense_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_tiles("weight", (out_features, in_features))
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_mask("sparse", Execution())

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: ``[..., I]`` to ``[..., O]``."""
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.phase == "dense":
            return F.linear(input, self.weight, self.bias)
        return multiply(self, input)


def multiply(layer: MaskedLayer, input: Tensor) -> Tensor:
    """Multiply tokens ``[..., K]`` by a masked layer's matrix, add bias and adapter: ``[..., O]``."""
    execution = layer.execution
    output = sparse_linear(
        input, layer.thresholded_matrix(), layer.mask_codes, layer.bias, gradient=layer.gradient,
        backend=layer.backend, transposable=execution.transposable, draws=layer.draws, seed=execution.seed,
        backward_codes=layer.backward_codes,
    )  # fmt: skip
    if layer.adapter is None:
        return output
    down, up = as_constants(layer.adapter)
    return output + F.linear(F.linear(input, down), up)


def _masked(weight: Tensor, codes: Tensor) -> Tensor:
    return weight.masked_fill(~unpack_codes(codes), 0)
