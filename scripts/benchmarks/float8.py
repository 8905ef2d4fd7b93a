"""Dense linear layers in 8-bit floats: the baseline that users will ask for beside 16-bit ones.

One scale for each tensor, from its largest magnitude at every use; e4m3 for inputs and weights, e5m2 for gradients,
all three products in 8 bits, results in the inputs' 16 bits. This is what torchao's float8 training does by default
("tensorwise", dynamic), written here over ``torch._scaled_mm`` because torchao is no dependency.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.kernels.torch_internals import scaled_mm

INPUTS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (8, 9)  # the first with 8-bit floats
MULTIPLE = 16  # of every size of a product


class Float8Linear(nn.Linear):
    """``nn.Linear`` whose three products are computed in 8-bit floats; its weight stays what it was."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., O]`` for ``[..., I]``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = Float8Product.apply(x.flatten(0, -2), self.weight)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class Float8Product(torch.autograd.Function):
    """``X·Wᵀ``, and its gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        """Return ``[T, O]`` in the dtype of ``rows [T, I]`` for ``weight [O, I]``."""
        ctx.save_for_backward(rows, weight)
        return product(rows, INPUTS, weight, INPUTS, rows.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of rows and weight."""
        rows, weight = ctx.saved_tensors
        dx = product(dy, GRADIENTS, weight.t(), INPUTS, rows.dtype)
        dw = product(dy.t(), GRADIENTS, rows.t(), INPUTS, rows.dtype)
        return dx, dw.to(weight.dtype)


def product(one: Tensor, one_dtype: torch.dtype, two: Tensor, two_dtype: torch.dtype, out: torch.dtype) -> Tensor:
    """Return ``one [M, K] · two [N, K]ᵀ``, both rounded to 8 bits with a scale of their own."""
    left, left_scale = scaled(one, one_dtype)
    right, right_scale = scaled(two, two_dtype)
    # gradients are summed exactly, as torchao does
    fast = one_dtype == INPUTS
    result: Tensor = scaled_mm(left, right.t(), left_scale, right_scale, out_dtype=out, use_fast_accum=fast)
    return result


def scaled(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a contiguous matrix in 8 bits and the float32 scale that it is to be multiplied by."""
    largest = torch.finfo(dtype).max
    scale = matrix.detach().abs().amax().float().clamp(min=1e-12) / largest
    return (matrix.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


def why_not(device: torch.device) -> str | None:
    """Say in one sentence why a device has no such products, or return None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"compute capability is {have}: 8-bit floats need 8.9."
    try:
        ones = torch.ones(MULTIPLE, MULTIPLE, device=device)
        product(ones, INPUTS, ones, INPUTS, torch.bfloat16)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch._scaled_mm does not run here: {str(error).strip().splitlines()[0]}"
    return None


def convert_(blocks: nn.Module) -> int:
    """Turn the linear layers of a module into 8-bit ones, in place, where their sizes allow it; return how many."""
    layers = [
        layer
        for layer in blocks.modules()
        if type(layer) is nn.Linear and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
    ]
    for layer in layers:
        layer.__class__ = Float8Linear
    return len(layers)
