"""``SparseConv1d`` and ``SparseConv2d``: convolutions whose weight, as the matrix of an implicit GEMM, is masked."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ..distributed.shards import to_local
from ..kernels.tile_codes import unpack_codes
from ..kernels.torch_internals import explicit_padding, is_transformed
from ..masks.gradient_rules import GradientRule
from ..masks.matrices import weight_of
from ..matmul.autocast import as_autocast, autocast_dtype
from ..matmul.kept_weight import may_keep
from ..matmul.transforms import as_constants, as_leaf, transformed_weight, with_gradient_of_input
from .masked_layer import MaskedLayer
from .products import multiply
from .sharded.gathered_products import gathered_backward_codes, gathered_weight

ONES = ((1,), (1, 1))
"""Kernels of linear layers."""

NO_PADDING = ((0,), (0, 0), "same", "valid")
"""Paddings of such kernels that add nothing."""


class MaskWeight(torch.autograd.Function):
    """``W⊙M`` forward; backward, the gradient by a gradient rule."""

    @staticmethod
    def forward(weight: Tensor, codes: Tensor, rule: GradientRule) -> Tensor:
        """Return the masked weight ``[O, I, *kernel]``, contiguous."""
        # nothing in place: torch 2.11 compiles a function that writes to its own tensors into wrong gradients
        return weight.masked_fill(weight_of(~unpack_codes(codes), weight.shape), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the codes."""
        ctx.save_for_backward(inputs[1])
        ctx.rule = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        """Return the gradient of the master."""
        return ctx.rule.apply(gradients[0], ctx.saved_tensors[0]), None, None


class TakeMaskedWeight(torch.autograd.Function):
    """What :class:`MaskWeight` computes, with the masked weight at hand."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: Tensor, codes: Tensor, rule: GradientRule) -> Tensor:
        """Return the masked weight, which may be in another dtype."""
        ctx.save_for_backward(codes)
        ctx.rule, ctx.dtype = rule, weight.dtype
        return masked.detach()  # another tensor for every graph

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the master."""
        return ctx.rule.apply(gradients[0].to(ctx.dtype), ctx.saved_tensors[0]), None, None, None


class TwoWeightConvolution(torch.autograd.Function):
    """A convolution whose input gradient is that of another weight; without padding, which the caller adds."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        backward_weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        dilation: Any,
    ) -> Tensor:
        """Convolve, and keep what the gradients need."""
        ctx.save_for_backward(input, weight, backward_weight)
        ctx.stride, ctx.dilation, ctx.bias_shape = stride, dilation, None if bias is None else list(bias.shape)
        none = [0] * len(stride)
        return torch.convolution(input, weight, bias, stride, none, dilation, False, none, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        input, weight, backward_weight = ctx.saved_tensors
        none = [0] * len(ctx.stride)
        rest = (ctx.bias_shape, ctx.stride, none, ctx.dilation, False, none, 1)
        backward = torch.ops.aten.convolution_backward
        wanted = [False, ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
        _, weight_gradient, bias_gradient = backward(gradients[0], input, weight, *rest, wanted)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = backward(gradients[0], input, backward_weight, *rest, [True, False, False])[0]
        return input_gradient, weight_gradient, None, bias_gradient, None, None


class SparseConvolution(MaskedLayer):
    """A convolution with a mask on its matrix ``[O, kernel·I]``, so that groups of four are input channels.

    A 1×1 convolution without padding is a linear layer on every position and has its products where they are sparse or
    estimated. All others are dense convolutions with the masked weight.
    """

    in_channels: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: Any

    @property
    def has_sparse_products(self) -> bool:
        """Whether it is a linear layer on every position, whose products are sparse GEMMs."""
        return self.is_2_4 and is_pointwise(self)

    def features_last(self, input: Tensor) -> Tensor:
        """Return the input with its channels in the last dimension."""
        return input.movedim(-len(self.stride) - 1, -1)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``[batch, I, *space]``, or one image ``[I, *space]``."""
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.phase == "dense":
            return cast(Tensor, super().forward(input))
        if self.shard is not None:
            return self._convolve_gathered(input)
        if is_pointwise(self) and (self.backend != "masked" or self.draws is not None):
            return self._multiply_positions(input)
        return self._convolve(input)

    def _multiply_positions(self, input: Tensor) -> Tensor:
        space = len(self.stride)
        if input.dim() not in (space + 1, space + 2) or input.shape[-space - 1] != self.in_channels:
            return cast(Tensor, super().forward(input))  # raises what the dense layer does
        tokens = self.features_last(input)
        if any(step > 1 for step in self.stride):
            steps = (slice(None, None, step) for step in self.stride)
            tokens = tokens[(..., *steps, slice(None))]  # type: ignore[index]
        output = multiply(self, tokens).movedim(-1, -space - 1)
        # the order in memory is that which the dense convolution gives
        return output if _channels_last(input) or _channels_last(self.weight) else output.contiguous()

    def _convolve(self, input: Tensor) -> Tensor:
        master = self.weight
        if self.soft_scale is not None:
            master = self.as_weight(self.thresholded_matrix())
        weight = self._masked(master)
        if self.backward_codes is None:
            return cast(Tensor, self._conv_forward(input, weight, self.bias))  # type: ignore[operator]
        backward_weight = self._masked(master.detach(), self.backward_codes)
        if is_transformed():
            output = cast(Tensor, self._conv_forward(input.detach(), weight, self.bias))  # type: ignore[operator]
            other = cast(Tensor, self._conv_forward(input, backward_weight, None))  # type: ignore[operator]
            return with_gradient_of_input(output, other)
        return self._convolve_twice(input, weight, backward_weight)

    def _convolve_twice(self, input: Tensor, weight: Tensor, backward_weight: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        one = input.dim() == len(self.stride) + 1  # image without a batch
        padded = F.pad(input[None] if one else input, explicit_padding(self), mode=mode)
        tensors = [as_autocast(tensor) for tensor in (padded, weight, backward_weight)]
        bias = None if self.bias is None else as_autocast(self.bias)
        output = cast(Tensor, TwoWeightConvolution.apply(*tensors, bias, self.stride, self.dilation))  # type: ignore[no-untyped-call]
        return output[0] if one else output

    def _convolve_gathered(self, input: Tensor) -> Tensor:
        weight = gathered_weight(self, self.weight, self.gradient)
        added: Tensor | float = 0.0
        if self.adapter is not None:
            down, up = map(to_local, as_constants(self.adapter))
            added = weight_of(up @ down, weight.shape)
            weight = weight + added
        codes = gathered_backward_codes(self)
        if codes is None:
            return cast(Tensor, self._conv_forward(input, weight, self.bias))  # type: ignore[operator]
        pruned = weight_of(~unpack_codes(codes), weight.shape)
        again = gathered_weight(self, self.weight).detach().masked_fill(pruned, 0)
        return self._convolve_twice(input, weight, again + added)

    def _masked(self, master: Tensor, backward_codes: Tensor | None = None) -> Tensor:
        codes, parameter = self.mask_codes, self.weight
        if self.soft_scale is None and may_keep(parameter):
            # with an adapter, autocast casts the sum
            dtype = parameter.dtype if self.adapter is not None else autocast_dtype(parameter)
            masked = self.operands.kept.get(parameter, parameter, codes, backward_codes, dtype)
            weight = cast(Tensor, TakeMaskedWeight.apply(master, masked, codes, self.gradient))  # type: ignore[no-untyped-call]
        else:
            codes = codes if backward_codes is None else codes & backward_codes
            if is_transformed():
                weight = transformed_weight(master, codes, self.gradient)
            else:
                weight = cast(Tensor, MaskWeight.apply(master, codes, self.gradient))  # type: ignore[no-untyped-call]
        if self.adapter is not None:
            down, up = as_constants(self.adapter)
            weight = weight + self.as_weight(up @ down)
        # the output lies in memory as the weight does
        if _channels_last(self.weight) and not is_transformed():
            return weight.to(memory_format=torch.channels_last)
        return weight.contiguous() if self.weight.is_contiguous() else weight


class SparseConv1d(SparseConvolution, nn.Conv1d):
    """An ``nn.Conv1d`` with a mask: same parameters, same ``state_dict``, and tile codes beside them.

    Made in place by :func:`sparsetrain.sparsify_`; ``groups`` is 1 and both channel counts are multiples of 4.

    Example:
        >>> from sparsetrain import sparsify_
        >>> model = nn.Sequential(nn.Conv1d(8, 4, 3))
        >>> _ = sparsify_(model, "all-conv", verbose=False)
        >>> model[0].mask.shape, model[0](torch.zeros(2, 8, 9)).shape
        (torch.Size([4, 8, 3]), torch.Size([2, 4, 7]))
    """

    dense_class = nn.Conv1d


class SparseConv2d(SparseConvolution, nn.Conv2d):
    """An ``nn.Conv2d`` with a mask: same parameters, same ``state_dict``, and tile codes beside them.

    Made in place by :func:`sparsetrain.sparsify_`; ``groups`` is 1 and both channel counts are multiples of 4.

    Example:
        >>> from sparsetrain import sparsify_
        >>> model = nn.Sequential(nn.Conv2d(8, 4, 3))
        >>> _ = sparsify_(model, "all-conv", verbose=False)
        >>> model[0].mask.sum().item(), tuple(model[0].mask_codes.shape)
        (144, (1, 18))
    """

    dense_class = nn.Conv2d


def is_pointwise(layer: nn.Module) -> bool:
    """Return whether a convolution is a linear layer on every position: kernel 1, no padding.

    Example:
        >>> is_pointwise(nn.Conv2d(8, 4, 1, stride=2)), is_pointwise(nn.Conv2d(8, 4, 1, padding=1))
        (True, False)
        >>> is_pointwise(nn.Conv1d(8, 4, 1, padding="same")), is_pointwise(nn.Conv2d(8, 4, (1, 3)))
        (True, False)
    """
    return layer.kernel_size in ONES and layer.padding in NO_PADDING


def _channels_last(tensor: Tensor) -> bool:
    # by strides, as a kernel of 1 is contiguous in both orders
    if tensor.dim() != 4:
        return False
    channels, width = tensor.shape[1], tensor.shape[3]
    return tensor.stride()[1:] == (1, channels * width, channels)
