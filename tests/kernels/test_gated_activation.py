"""Gated activations by operator and kernel against torch's functions and its autograd."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from poisoned import Margins
from torch import Tensor

from sparsetrain.kernels.gated_activation import KINDS, gated_activation, gated_activation_backward
from sparsetrain.kernels.gated_activation.triton_kernel import backward_into, forward_into

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ULP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def expected(gate: Tensor, up: Tensor | None, kind: str, grad: Tensor) -> list[Tensor]:
    """Result and gradients by torch's own autograd in float64."""
    leaves = [tensor.double().detach().requires_grad_() for tensor in (gate, up) if tensor is not None]
    x = leaves[0]
    functions: dict[str, Callable[[], Tensor]] = {
        "swiglu": lambda: F.silu(x) * leaves[1],
        "geglu": lambda: F.gelu(x) * leaves[1],
        "relu2": lambda: F.relu(x) ** 2,
    }
    result = functions[kind]()
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.double())]


def operand(shape: tuple[int, int], dtype: torch.dtype, layout: str, margins: Margins) -> Tensor:
    rows, columns = shape
    if layout == "columns":
        return margins.of(torch.randn(columns, rows).to(dtype)).t()
    if layout == "strided":
        return margins.of(torch.randn(rows, columns + 1).to(dtype), gap=2)[:, 1:]
    return margins.of(torch.randn(shape).to(dtype))


def target(like: Tensor, margins: Margins) -> Tensor:
    """Strides of the operand, nothing written yet."""
    by_columns = like.stride(0) == 1
    found = margins.empty(*(like.shape[::-1] if by_columns else like.shape), dtype=like.dtype)
    return found.t() if by_columns else found


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.cpu().double(), wanted.cpu(), rtol=ULP[dtype], atol=ULP[dtype] / 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_agree_with_torch_in_every_mixture_of_layouts(kind: str, dtype: torch.dtype, margins: Margins) -> None:
    layouts = ("rows", "columns", "strided")
    for shape, gate_layout, up_layout in itertools.product([(5, 7), (70, 130)], layouts, layouts):
        gate, up = (operand(shape, dtype, layout, margins) for layout in (gate_layout, up_layout))
        given = None if kind == "relu2" else up
        grad = operand(shape, dtype, up_layout, margins)
        results = [target(tensor, margins) for tensor in (gate, gate, up)]
        forward_into(gate, given, kind, results[0])
        backward_into(grad, gate, given, kind, results[1], None if given is None else results[2])
        wanted = expected(gate, given, kind, grad)
        for found, want in zip(results, wanted, strict=False):
            close(found, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 8)])
def test_the_operator_and_its_gradients_agree_with_torch(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], kernel_device: str
) -> None:
    gate, up, grad = (torch.randn(shape, device=kernel_device).to(dtype) for _ in range(3))
    leaves = [tensor.requires_grad_() for tensor in ((gate,) if kind == "relu2" else (gate, up))]
    result = gated_activation(gate, None if kind == "relu2" else up, kind)
    assert (result.dtype, result.shape) == (dtype, torch.Size(shape))
    gradients = torch.autograd.grad(result, leaves, grad)
    wanted = expected(gate, None if kind == "relu2" else up, kind, grad)
    for found, want in zip((result.detach(), *gradients), wanted, strict=True):
        close(found, want, torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_pass_opcheck_and_gradcheck(kind: str, kernel_device: str) -> None:
    gate, up = (torch.randn(6, 10, dtype=torch.float64, device=kernel_device, requires_grad=True) for _ in range(2))
    given = None if kind == "relu2" else up
    assert torch.autograd.gradcheck(
        lambda *leaves: gated_activation(leaves[0], *(leaves[1:] or (None,)), kind),
        (gate,) if given is None else (gate, up),
    )
    for dtype in (torch.float32, torch.bfloat16):
        single = [tensor.detach().to(dtype).requires_grad_() for tensor in (gate, up)]
        arguments = (single[0], None if given is None else single[1], kind)
        torch.library.opcheck(gated_activation, arguments)
        detached = tuple(part.detach() if isinstance(part, Tensor) else part for part in arguments)
        torch.library.opcheck(gated_activation_backward, (torch.ones_like(detached[0]), *detached))


def test_results_lie_as_their_operands_do(kernel_device: str) -> None:
    gate, up = torch.randn(8, 4, device=kernel_device).t(), torch.randn(4, 8, device=kernel_device)
    gate.requires_grad_()
    up.requires_grad_()
    result = gated_activation(gate, up, "swiglu")
    assert result.stride() == gate.stride()
    grads = gated_activation_backward(torch.ones_like(result), gate.detach(), up.detach(), "swiglu")
    assert [part.stride() for part in grads] == [gate.stride(), up.stride()]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 / (1 + inf) is meant
def test_extremes_stay_finite_and_nan_stays_nan(kernel_device: str) -> None:
    gate = torch.tensor([[-200.0, 200.0, 0.0, float("nan")]], device=kernel_device)
    up = torch.ones_like(gate)
    for kind in KINDS:
        result = torch.full_like(gate, 7.0)
        forward_into(gate, None if kind == "relu2" else up, kind, result)
        assert result[0, :3].isfinite().all()
        assert result[0, 3].isnan()
        assert result[0, 0].abs() < 1e-30


@pytest.mark.parametrize(
    ("gate", "up", "kind", "words"),
    [
        (torch.zeros(2, 2), None, "swish", "kind is 'swish'"),
        (torch.zeros(2, 2), None, "swiglu", "up is missing: 'swiglu' needs up"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "relu2", "up is given: 'relu2' has no up"),
        (torch.zeros(2, 2), torch.zeros(2, 3), "geglu", r"up is torch.float32 \(2, 3\)"),
        (torch.zeros(2, 2).int(), None, "relu2", "gate is torch.int32"),
    ],
)
def test_bad_input_is_one_sentence(gate: Tensor, up: Tensor | None, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        gated_activation(gate, up, kind)
    assert "\n" not in str(caught.value)
