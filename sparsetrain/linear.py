"""``sparse_linear`` and ``SparseLinear``: a linear layer whose products see the masked weight."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .backends import resolve_backend
from .estimated_gradient import draw_counter, estimated_weight_gradient
from .gradient_rules import GradientRule, resolve_gradient_rule
from .kernels.masked_update.reference import apply_mask_
from .kernels.tile_codes.reference import unpack_codes
from .operands import Execution, Operands, register
from .products import masked_product
from .soft_threshold import SoftThreshold, soft_thresholded
from .tiles import KEEP_ALL, require_tiles

PhaseKind = Literal["dense", "sparse", "frozen"]
"""dense: no mask; sparse: the mask is refreshed while training; frozen: the mask is fixed."""


AUTO_DEVICES = ("cuda",)
"""Where ``backend="auto"`` has a choice; elsewhere it is ``masked``."""


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
        result = masked_product(input.reshape(-1, weight.shape[1]), weight, codes, bias, False, rules.forward)
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
                input_gradient = output_gradient.matmul(
                    _masked(weight, codes if backward_codes is None else backward_codes).to(output_gradient.dtype)
                )
            else:
                product = masked_product(rows, weight, codes, None, True, rules.input_gradient)
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
        transposable: Whether the mask is transposable; if not, the input gradient is computed densely.
        draws: Counter of a random estimate, int64 ``[2]``: then the weight gradient is computed from an unbiased 2:4
            estimate of the output gradient, and the counter goes up by one in every backward.
        seed: Of the estimate.
        backward_codes: int16 ``[O/4, I/4]`` of the mask in the input gradient's product, if it is another one; that
            product is computed densely then.

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
    if weight.dim() != 2 or input.shape[-1:] != weight.shape[1:]:
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
    if name == "auto" and device not in AUTO_DEVICES:
        name = "masked"
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input = _autocast(input, dtype)
        if name == "masked":  # others read the master itself
            weight, bias = _autocast(weight, dtype), None if bias is None else _autocast(bias, dtype)
    elif name != "masked" and input.dtype != weight.dtype:
        raise ValueError(
            f"input is {input.dtype} but weight is {weight.dtype}: they must be alike outside of autocast, so cast one "
            "of them or use autocast."
        )
    rules = Rules(rule, name, name if transposable and backward_codes is None else "masked", seed)
    result = SparseLinearFunction.apply(input, weight, codes, bias, draws, backward_codes, rules)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


class SparseLinear(nn.Linear):
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

    _dynamo_marked_static = True  # sizes of codes are no dynamic dimensions, as those of nn.Linear's weight are not

    mask_codes: Tensor
    draws: Tensor | None
    backward_codes: Tensor | None  # of the input gradient's product, if they are others
    adapter: tuple[Tensor, Tensor] | None  # down [r, I] and up [O, r]
    soft_scale: Tensor | None  # β of the soft threshold; None for a hard mask
    phase: PhaseKind
    gradient: GradientRule
    execution: Execution
    operands: Operands

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

    @property
    def mask(self) -> Tensor:
        """The mask as bool ``[O, I]``, whether or not it is in force."""
        return unpack_codes(self.mask_codes)

    @property
    def is_masked(self) -> bool:
        """Whether the mask is in force."""
        return self.phase != "dense"

    @torch.no_grad()
    def set_codes_(self, codes: Tensor) -> None:
        """Copy tile codes ``[O/4, I/4]`` in place, so that compiled graphs stay valid."""
        self.mask_codes.copy_(codes)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: ``[..., I]`` to ``[..., O]``."""
        if self.phase == "dense":
            return F.linear(input, self.weight, self.bias)
        weight: Tensor = self.weight
        if self.soft_scale is not None:
            soft = SoftThreshold.apply(weight, self.mask_codes, self.soft_scale, self.execution.transposable)  # type: ignore[no-untyped-call]
            weight = cast(Tensor, soft)
        output = sparse_linear(
            input, weight, self.mask_codes, self.bias, gradient=self.gradient, backend=self.execution.backend,
            transposable=self.execution.transposable, draws=self.draws, seed=self.execution.seed,
            backward_codes=self.backward_codes,
        )  # fmt: skip
        if self.adapter is None:
            return output
        down, up = self.adapter
        return output + F.linear(F.linear(input, down), up)

    def train(self, mode: bool = True) -> "SparseLinear":
        """Switch between training and evaluation; weights may be swapped around it, so operands are made anew."""
        if mode != self.training:
            self.operands.expire()
        return super().train(mode)

    def describe_products(self) -> str:
        """Say who computes the layer's products, as far as it has been decided."""
        if self.execution.backend == "auto" and self.weight.device.type not in AUTO_DEVICES:
            return "masked"
        return self.operands.describe()

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does, and its phase."""
        return f"{super().extra_repr()}, phase={self.phase}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SparseLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # no buffers: data-parallel modules cannot broadcast int16, and averages of codes mean nothing
        self.mask_codes = fn(self.mask_codes)
        self.draws = None if self.draws is None else fn(self.draws)
        self.soft_scale = None if self.soft_scale is None else fn(self.soft_scale)
        self.backward_codes = None if self.backward_codes is None else fn(self.backward_codes)
        register(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register(self)  # copied or loaded

    def _add_mask(self, phase: PhaseKind, execution: Execution) -> None:
        shape = (self.out_features // 4, self.in_features // 4)
        codes = torch.full(shape, KEEP_ALL, dtype=torch.int16, device=self.weight.device)
        self.mask_codes = codes
        self.phase = phase
        self.gradient = resolve_gradient_rule("ste")
        self.execution = execution
        draws = draw_counter(0, device=self.weight.device) if execution.weight_product == "mvue" else None
        self.draws = draws
        self.soft_scale = None
        self.backward_codes = None
        self.adapter = None
        self.operands = Operands(execution)
        register(self)


def to_sparse_(layer: nn.Linear, phase: PhaseKind = "sparse", execution: Execution | None = None) -> SparseLinear:
    """Turn an exact ``nn.Linear`` into a :class:`SparseLinear` in place; its mask keeps everything."""
    layer.__class__ = SparseLinear
    sparse = cast(SparseLinear, layer)
    sparse._add_mask(phase, execution or Execution())
    return sparse


def to_dense_(layer: SparseLinear, zeros: bool = True) -> nn.Linear:
    """Turn a :class:`SparseLinear` back into ``nn.Linear`` in place; with ``zeros``, a mask in force is written."""
    if zeros and layer.is_masked:
        if layer.soft_scale is not None:
            soft = soft_thresholded(layer.weight.data, layer.mask_codes, layer.execution.transposable)
            layer.weight.data.copy_(soft * layer.soft_scale)
        apply_mask_(layer.weight.data, layer.mask_codes)
    del layer.mask_codes, layer.draws, layer.soft_scale, layer.backward_codes, layer.adapter
    for name in ("phase", "gradient", "execution", "operands"):
        layer.__dict__.pop(name, None)
    dense = cast(nn.Linear, layer)
    dense.__class__ = nn.Linear
    return dense


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # autocast leaves float64 and integers alone
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _masked(weight: Tensor, codes: Tensor) -> Tensor:
    return weight.masked_fill(~unpack_codes(codes), 0)
