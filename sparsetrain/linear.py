"""``sparse_linear`` and ``SparseLinear``: a linear layer whose products see the masked weight."""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .autocast import as_autocast
from .backends import resolve_backend
from .eager import is_eager, is_plain
from .estimated_gradient import estimated_weight_gradient
from .gradient_rules import GradientRule, resolve_gradient_rule
from .kept_weight import may_keep
from .kernels.tile_codes.reference import unpack_codes
from .masked_layer import MaskedLayer, has_choice
from .operands import Execution, Operands
from .products import masked_product, multiply_rows
from .tiles import require_tiles
from .transforms import as_constants, as_leaf, is_transformed, transformed_linear


class Rules(NamedTuple):
    """What the autograd function knows beside its tensors: the gradient rule, who computes what, the seed of draws."""

    gradient: GradientRule
    forward: str
    input_gradient: str
    seed: int


class SparseLinearFunction(torch.autograd.Function):
    """``Y = X·(W⊙M)ᵀ + b``, ``dX = dY·(W⊙M)``, ``dW`` by a gradient rule, ``db = ΣdY``.

    ``forward`` takes the context, because ``setup_context`` costs 15 microseconds more a call; function transforms are
    handled before.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, codes: Tensor, bias: Tensor | None, draws: Tensor | None,
        backward_codes: Tensor | None, rules: Rules, eager: "Eager | None" = None,
    ) -> Tensor:  # fmt: skip
        """Compute the forward product, and keep what the two gradient products need."""
        ctx.save_for_backward(input, weight, codes, backward_codes)
        ctx.draws, ctx.rules, ctx.bias_dtype = draws, rules, None if bias is None else bias.dtype
        ctx.eager = eager
        if rules.forward == "masked":
            masked = _masked(weight, codes) if eager is None or eager.masked is None else eager.masked
            return F.linear(input, masked, bias)
        rows = input if input.dim() == 2 else input.reshape(-1, weight.shape[1])
        if eager is None:
            result = masked_product(rows, weight, codes, bias, False, rules.forward, backward_codes)
        else:
            result = multiply_rows(eager.operands, rows, weight, codes, bias, False, rules.forward, backward_codes)
        return result if input.dim() == 2 else result.view(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are asked for."""
        (output_gradient,) = cast(tuple[Tensor], output_gradients)
        input, weight, codes, backward_codes = ctx.saved_tensors
        rules: Rules = ctx.rules
        differentiable = torch.is_grad_enabled()
        if rules.forward != "masked" and differentiable and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"backend is {rules.forward!r} and a gradient of gradients is asked for (create_graph=True): only "
                "'masked' has one, so use backend='masked'."
            )
        # what was kept has no part in a graph of gradients, nor where something follows the operations
        eager: Eager | None = None if differentiable or not is_eager(output_gradient) else ctx.eager
        input_gradient = weight_gradient = bias_gradient = None
        rows = output_gradient if output_gradient.dim() == 2 else output_gradient.reshape(-1, weight.shape[0])
        if ctx.needs_input_grad[0]:
            if rules.input_gradient == "masked":
                masked = None if eager is None else eager.masked_backward()
                if masked is None:
                    masked = _masked(weight, codes if backward_codes is None else codes & backward_codes)
                input_gradient = output_gradient.matmul(masked.to(output_gradient.dtype))
            else:
                rest = (weight, codes, None, True, rules.input_gradient, backward_codes)
                product = masked_product(rows, *rest) if eager is None else multiply_rows(eager.operands, rows, *rest)
                input_gradient = product if input.dim() == 2 else product.view(input.shape)
        if ctx.needs_input_grad[1]:
            tokens = input if input.dim() == 2 else input.reshape(-1, weight.shape[1])
            if ctx.draws is None:
                whole = rows.t().matmul(tokens)
            else:
                whole = estimated_weight_gradient(rows, tokens, codes, ctx.draws, rules.seed, rules.forward)
            # by the rule in the dtype of the products, as if autocast had cast the weight outside
            whole = whole.to(weight.dtype) if rules.forward != "masked" else whole
            if eager is not None and rules.gradient.name == "masked":
                weight_gradient = eager.operands.kept.prune_(whole, codes).to(weight.dtype)
            else:
                weight_gradient = rules.gradient.apply(whole, codes).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            bias_gradient = rows.sum(0).to(ctx.bias_dtype)
        return input_gradient, weight_gradient, None, bias_gradient, None, None, None, None


class Eager:
    """What a product in eager execution has at hand: its layer's operands, and the masked weight that is kept.

    Args:
        operands: Of the layer.
        masked: ``W⊙M`` in the dtype of the product, if that is dense.
        backward: ``W⊙M`` of the input gradient's product, if it is another.
    """

    __slots__ = ("_backward", "_version", "masked", "operands")

    def __init__(self, operands: Operands, masked: Tensor | None = None, backward: Tensor | None = None) -> None:
        self.operands, self.masked = operands, masked
        self._backward = masked if backward is None else backward
        self._version = None if self._backward is None else self._backward._version

    def masked_backward(self) -> Tensor | None:
        """Return the masked weight of the input gradient's product, unless it was renewed since."""
        kept = self._backward
        return kept if kept is not None and kept._version == self._version else None


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
    output = _eager_product(layer, input) if is_eager(input) else None
    if output is None:
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


def _eager_product(layer: MaskedLayer, input: Tensor) -> Tensor | None:
    """Return the product, without what :func:`sparse_linear` has to find out first; None if it has to.

    ``nn.Module`` finds parameters slowly, and every check here is one that costs next to nothing.
    """
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    codes, execution, again = layer.mask_codes, layer.execution, layer.backward_codes
    if weight is None or layer.soft_scale is not None or not is_plain(weight) or input.is_nested or not input.dim():
        return None
    matrix = weight if weight.dim() == 2 and not layer.transposed else layer.as_matrix(weight)
    columns = matrix.size(1)
    if codes.dtype is not torch.int16 or codes.dim() != 2 or input.size(-1) != columns:
        return None
    if codes.size(1) * 4 != columns or codes.size(0) * 4 != matrix.size(0):
        return None
    device = "cuda" if input.is_cuda else "cpu" if input.is_cpu else input.device.type
    name = execution.backend if layer.is_two_of_four else "masked"
    if name == "auto" and not has_choice(device):
        name = "masked"
    cast_to = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if cast_to is not None:
        input = as_autocast(input)
    elif name != "masked" and input.dtype is not weight.dtype:
        return None
    operands = layer.operands
    if name == "masked":
        if not may_keep(weight):
            return None
        dtype = weight.dtype
        if cast_to is not None:
            dtype = dtype if dtype is torch.float64 else cast_to
            bias = None if bias is None else as_autocast(bias)
        masked = operands.kept.get(weight, matrix, codes, None, dtype)
        other = None if again is None else operands.kept.get(weight, matrix, codes, again, dtype)
        eager = Eager(operands, masked, other)
    else:
        eager = Eager(operands)
    transposable = execution.transposable or again is not None
    gradient = resolve_gradient_rule(layer.gradient)
    rules = Rules(gradient, name, name if transposable else "masked", execution.seed)
    return cast(Tensor, SparseLinearFunction.apply(input, matrix, codes, bias, layer.draws, again, rules, eager))  # type: ignore[no-untyped-call]


def _masked(weight: Tensor, codes: Tensor) -> Tensor:
    return weight.masked_fill(~unpack_codes(codes), 0)
