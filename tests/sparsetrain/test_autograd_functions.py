"""Every autograd function: nothing in place, and compiled it gives the gradients that it gives eagerly.

torch 2.11 compiles a function that writes to its own tensors into wrong gradients, and says nothing.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import convnet
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain as st
from sparsetrain.kernels.mask_search import search_tiles
from sparsetrain.kernels.tile_codes.reference import unpack_codes
from sparsetrain.kernels.wire import to_wire
from sparsetrain.layers.convolution import MaskWeight, TwoWeightConvolution
from sparsetrain.layers.sharded.gathered_products import UnderRule
from sparsetrain.masks.gradient_rules import GRADIENT_RULES, scaled
from sparsetrain.masks.soft_threshold import SoftThreshold
from sparsetrain.matmul.estimated_weight_gradient import draw_counter
from sparsetrain.matmul.linear_function import LinearSpec, SparseLinearFunction
from sparsetrain.matmul.wire_matmul import WireLinearFunction
from sparsetrain.modifiers.inputs import _AddInBackward

ROOT = Path(__file__).resolve().parents[2]
ORDERS = [torch.contiguous_format, torch.channels_last]
RULES = {**GRADIENT_RULES, "scaled": scaled(0.5, 2.0)}

Case = Callable[[torch.memory_format], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]
"""Of a memory order: a function of the tensors that need gradients, and those tensors."""


def random_codes(rows: int, columns: int) -> Tensor:
    return st.transposable_codes(torch.randn(rows, columns))


def kernel(order: torch.memory_format) -> Tensor:
    return torch.randn(8, 12, 3, 2, dtype=torch.float64).contiguous(memory_format=order)


def mask_weight(rule: str) -> Case:
    codes = random_codes(8, 72)
    return lambda order: (lambda weight: MaskWeight.apply(weight, codes, RULES[rule]), (kernel(order),))


def two_weights(order: torch.memory_format) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    image = torch.randn(2, 12, 6, 7, dtype=torch.float64).contiguous(memory_format=order)
    other = kernel(order)
    bias = torch.randn(8, dtype=torch.float64)

    def convolve(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return TwoWeightConvolution.apply(image, weight, other, bias, (2, 1), (1, 2))

    return convolve, (image, kernel(order), bias)


def linear(rule: str, backward: bool = False, estimated: bool = False) -> Case:
    codes, kept = random_codes(8, 16), random_codes(8, 16) if backward else None
    rules = LinearSpec(RULES[rule], "masked", "masked", 3)

    def make(order: torch.memory_format) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        dtype = torch.float32 if estimated else torch.float64
        tensors = (torch.randn(2, 32, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype), torch.randn(8, dtype=dtype))
        counter = draw_counter(0) if estimated else None

        def multiply(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            draws = None if counter is None else counter.clone()  # every call draws alike
            return SparseLinearFunction.apply(input, weight, codes, bias, draws, kept, rules)

        return multiply, tensors

    return make


def wire(rule: str) -> Case:
    codes = search_tiles(torch.randn(8, 16), True)
    values, numbers = to_wire(torch.randn(8, 16), codes, torch.float32)
    rules = LinearSpec(RULES[rule], "masked", "masked", 3)

    def make(order: torch.memory_format) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        def multiply(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return WireLinearFunction.apply(input, weight, values, numbers, codes, bias, None, rules)

        return multiply, (torch.randn(2, 32, 16), torch.randn(8, 16), torch.randn(8))

    return make


def under_rule(rule: str) -> Case:
    weight = torch.where(torch.rand(8, 16) > 0.5, torch.randn(8, 16, dtype=torch.float64), -0.0)
    return lambda order: (lambda weight: UnderRule.apply(weight, RULES[rule]), (weight,))


def soft(transposable: bool) -> Case:
    codes, scale = random_codes(8, 16), torch.tensor(1.5, dtype=torch.float64)
    return lambda order: (
        lambda weight: SoftThreshold.apply(weight, codes, scale, transposable),
        (torch.randn(8, 16, dtype=torch.float64),),
    )


TOTAL = torch.zeros(16, dtype=torch.float64)
"""What the function of observers adds to in its backward, by name and by right."""


def observed(order: torch.memory_format) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    summary = torch.ones(16, dtype=torch.float64)
    return lambda output: _AddInBackward.apply(output, summary, TOTAL), (torch.randn(8, 16, dtype=torch.float64),)


torch.manual_seed(0)
CASES: dict[str, Case] = {
    **{f"MaskWeight, {rule}": mask_weight(rule) for rule in RULES},
    "TwoWeightConvolution": two_weights,
    **{f"SparseLinearFunction, {rule}": linear(rule) for rule in RULES},
    "SparseLinearFunction, double-pruned": linear("ste", backward=True),
    "SparseLinearFunction, estimated": linear("ste", estimated=True),
    "SoftThreshold, row-wise": soft(False),
    "SoftThreshold, transposable": soft(True),
    "_AddInBackward": observed,
    **{f"WireLinearFunction, {rule}": wire(rule) for rule in RULES},
    **{f"UnderRule, {rule}": under_rule(rule) for rule in RULES if rule != "ste"},
}

EAGER = {"EagerLinearFunction", "TakeMaskedWeight"}
"""Which no compiled code calls: test_kept_weight.py compares them with the others."""

# a matrix has one order
SETTINGS = [(name, order) for name in CASES for order in ORDERS[: 2 if "Weight" in name else 1]]


def autograd_functions() -> Iterator[str]:
    """Names of all subclasses of ``torch.autograd.Function`` in the package, read from its sources."""
    for floor in ("kernels", "sparsetrain", "callbacks", "recipes"):
        for path in (ROOT / floor).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any(
                    ast.unparse(base).split(".")[-1] == "Function" for base in node.bases
                ):
                    yield node.name


def test_compiled_masks_have_no_views_of_another_dtype() -> None:
    """Which inductor cannot lower for bools before torch 2.12."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    codes = torch.randint(-(2**15), 2**15, (3, 5), dtype=torch.int16)
    mask = torch.compile(unpack_codes, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(codes)
    expected = [[bool(codes[o // 4, i // 4] >> (4 * (o % 4) + i % 4) & 1) for i in range(20)] for o in range(12)]
    assert mask.tolist() == expected
    assert seen
    assert not [name for name in seen if "view.dtype" in name]


def test_every_autograd_function_has_a_case() -> None:
    assert {name.split(",")[0] for name in CASES} == set(autograd_functions()) - EAGER


class InPlace(TorchDispatchMode):
    """Records operations of torch's own that write to anything but ``TOTAL``."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and func._schema.is_mutable and args[0].is_floating_point():
            if args[0].data_ptr() == TOTAL.data_ptr():
                return func(*args, **(kwargs or {}))
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "order"), SETTINGS, ids=str)
def test_no_autograd_function_writes_in_place(name: str, order: torch.memory_format) -> None:
    function, tensors = CASES[name](order)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    with InPlace() as mode:
        output = function(*inputs)
        torch.autograd.grad(output, inputs, torch.ones_like(output))
    assert not mode.found


def with_neighbours(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function with something before and behind it, which a compiler takes together; returns a loss too."""

    def whole(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = function(*(tensor * 1.5 for tensor in inputs))
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        return output, (output.sin() * weights).sum()

    return whole


@pytest.mark.parametrize(("name", "order"), SETTINGS, ids=str)
def test_compiled_functions_give_the_gradients_of_eager_ones(name: str, order: torch.memory_format) -> None:
    function, tensors = CASES[name](order)
    totals, results = [], []
    whole = with_neighbours(function)
    torch._dynamo.reset()
    for run in (whole, torch.compile(whole, fullgraph=True, backend="aot_eager")):
        TOTAL.zero_()
        inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]  # in the same memory order
        output, loss = run(*inputs)
        results.append([output.detach(), *torch.autograd.grad(loss, inputs)])
        totals.append(TOTAL.clone())
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(*totals)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "convolution": (convnet, "all-conv", {"preset": "fst", "warmup": 0}),
    "convolution, soft threshold": (convnet, "all-conv", {"preset": "s_ste"}),
}


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_trains_as_an_eager_one_does(name: str, order: torch.memory_format) -> None:
    make, targets, method = MODELS[name]
    weights = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = make().double().to(memory_format=order)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training = st.SparseTraining(model, optimizer, method, 6, targets, verbose=False)
        seen = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(2):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            (seen(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
        assert training.metrics()["violations"] == 0
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-9, atol=1e-12)
