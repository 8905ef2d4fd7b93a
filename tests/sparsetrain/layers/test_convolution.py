"""Convolutions: their mask in the layout of an implicit GEMM, and products and gradients with the masked weight."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu_checks import assert_same_gradients
from oracles import brute_force_mask
from simulated_backend import SimulatedBackend
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.masked_layer import MaskedLayer, written_as_matrices
from sparsetrain.masks.matrices import matrix_of, weight_of

LAYERS: dict[str, Callable[[], Any]] = {
    "2-D": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "2-D, strided and dilated": lambda: nn.Conv2d(8, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1)),
    "2-D, same, no bias": lambda: nn.Conv2d(4, 8, (2, 3), padding="same", bias=False),
    "2-D, reflected": lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
    "2-D, pointwise": lambda: nn.Conv2d(8, 12, 1),
    "2-D, pointwise, strided": lambda: nn.Conv2d(8, 4, 1, stride=(2, 3), bias=False),
    "2-D, pointwise, padded": lambda: nn.Conv2d(8, 4, 1, padding=1),
    "1-D": lambda: nn.Conv1d(8, 4, 5, stride=2, padding=2),
    "1-D, pointwise": lambda: nn.Conv1d(4, 8, 1, stride=2),
}


def masked(name: str, pattern: str = "transposable", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A masked layer and an input of it."""
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name]()).to(dtype)
    st.sparsify_(model, "all-conv", pattern=pattern, verbose=False)
    layer = model[0]
    space = (9,) if isinstance(layer, nn.Conv1d) else (7, 9)
    return layer, torch.randn(3, layer.in_channels, *space, dtype=dtype)  # type: ignore[call-overload]


def dense_twin(layer: nn.Module) -> nn.Module:
    """The dense layer that computes what the masked one must: its weight has zeros by hand."""
    twin = copy.deepcopy(layer)
    st.export_dense_(nn.Sequential(twin), zeros=False)
    twin.weight.data.mul_(layer.mask)
    return twin


def test_groups_of_four_are_input_channels_at_one_kernel_position() -> None:
    weight = torch.randn(4, 8, 3, 2)
    matrix = matrix_of(weight)
    assert matrix.shape == (4, 48)
    for o, i, y, x in itertools.product(range(4), range(8), range(3), range(2)):
        assert matrix[o, (y * 2 + x) * 8 + i] == weight[o, i, y, x]


def test_the_matrix_is_the_left_factor_of_the_implicit_gemm() -> None:
    weight, image = torch.randn(8, 4, 3, 3, dtype=torch.float64), torch.randn(1, 4, 5, 6, dtype=torch.float64)
    patches = torch.stack([image[0, :, y : y + 3, x : x + 3].permute(1, 2, 0).flatten() for y, x in np.ndindex(3, 4)])
    expected = F.conv2d(image, weight)[0].flatten(1)
    torch.testing.assert_close(matrix_of(weight) @ patches.T, expected)


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3), (8, 4, 3, 2)])
def test_a_matrix_becomes_the_weight_again(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(weight_of(matrix_of(weight), shape), weight)


@pytest.mark.parametrize("order", ["channels last", "contiguous", "transposed", "one kernel position"])
def test_what_is_written_to_the_matrix_reaches_the_weight_in_any_memory_order(order: str) -> None:
    weight = torch.full((4, 8, 3, 2), torch.nan)
    if order == "channels last":
        weight = weight.contiguous(memory_format=torch.channels_last)
    elif order == "transposed":
        weight = torch.full((2, 3, 8, 4), torch.nan).permute(3, 2, 1, 0)
    elif order == "one kernel position":
        weight = torch.full((4, 8, 1, 1), torch.nan)
    version = weight._version
    layer = to_sparse_(nn.Conv2d(8, 4, tuple(weight.shape[2:])))
    with written_as_matrices([layer], [weight]) as (matrix,):
        shared = matrix.data_ptr() == weight.data_ptr()
        matrix.copy_(torch.arange(matrix.numel()).view_as(matrix))
    assert shared == (order in ("channels last", "one kernel position"))
    assert weight._version > version
    for o, i, y, x in itertools.product(*map(range, weight.shape)):
        columns = 8 * weight.shape[2] * weight.shape[3]
        assert weight[o, i, y, x] == o * columns + (y * weight.shape[3] + x) * 8 + i


@pytest.mark.parametrize("name", LAYERS)
def test_the_mask_is_the_best_transposable_one_of_every_kernel_position(name: str) -> None:
    layer, _ = masked(name)
    weight, mask = layer.weight.detach().flatten(2), layer.mask.flatten(2)
    assert layer.mask.shape == layer.weight.shape
    for position in range(weight.shape[2]):
        expected = brute_force_mask(weight[:, :, position].abs().double().numpy())
        assert np.array_equal(mask[:, :, position].numpy(), expected)


def test_a_row_wise_mask_keeps_two_of_four_input_channels() -> None:
    layer, _ = masked("2-D", "row_wise")
    fours = layer.weight.detach().abs().permute(0, 2, 3, 1).reshape(-1, 4)
    kept = layer.mask.permute(0, 2, 3, 1).reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    assert torch.equal((fours * kept).sum(1), fours.topk(2).values.sum(1))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batched", [True, False])
def test_products_and_gradients_are_those_of_the_masked_weight(name: str, batched: bool) -> None:
    layer, x = masked(name)
    x = x if batched else x[0]
    twin = dense_twin(layer)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = layer(ours), twin(theirs)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(expected)
    output.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for mine, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)  # straight through: pruned entries too
    layer.weight.grad = None
    layer.gradient = st.scaled(0.5, 0.25)
    layer(x).backward(direction)
    factor = torch.where(layer.mask, 0.5, 0.25)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * factor)


@pytest.mark.parametrize("kernel", [{"kernel_size": 3}, {"kernel_size": 1}, {"kernel_size": 1, "stride": 2}])
@pytest.mark.parametrize("weight_layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("input_layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("backend", ["masked", "simulated"])
def test_the_output_lies_in_memory_as_that_of_the_dense_layer(
    kernel: dict[str, int], weight_layout: torch.memory_format, input_layout: torch.memory_format, backend: str,
    simulated: SimulatedBackend,
) -> None:  # fmt: skip
    model = nn.Sequential(nn.Conv2d(16, 32, **kernel), nn.Conv2d(32, 16, 1)).bfloat16()
    st.sparsify_(model, "all-conv", backend=backend, verbose=False)
    layer, x = model[0].to(memory_format=weight_layout), torch.randn(2, 16, 7, 5).bfloat16()  # type: ignore[call-overload]
    x = x.contiguous(memory_format=input_layout)
    assert layer(x).stride() == dense_twin(layer)(x).stride()
    assert bool(simulated.calls["product"]) == (backend == "simulated" and kernel["kernel_size"] == 1)


def test_a_pointwise_convolution_refuses_what_the_dense_layer_refuses(simulated: SimulatedBackend) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1)).bfloat16()
    st.sparsify_(model, "all-conv", backend="simulated", verbose=False)
    for shape in ((2, 16, 3, 4, 5), (2, 8, 3, 4)):
        x, messages = torch.zeros(shape).bfloat16(), []
        for layer in (model[0], nn.Conv2d(16, 16, 1).bfloat16()):
            with pytest.raises(RuntimeError) as caught:
                layer(x)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("name", ["2-D", "2-D, pointwise", "1-D"])
def test_second_gradients(name: str) -> None:
    layer, x = masked(name)
    x = x[:1, :, :3, :3] if x.dim() == 4 else x[:1, :, :5]
    parameters = [layer.weight, layer.bias]

    def output(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # gradients with a straight-through weight are not those of the forward, so the input alone is varied
        return layer(x).square().sum()

    (first,) = torch.autograd.grad(output(x.requires_grad_(), *parameters), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    twin = dense_twin(layer)
    (expected,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_gives_the_dtype_and_numbers_of_the_dense_layer(name: str) -> None:
    layer, x = masked(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = layer(x), dense_twin(layer)(x)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["2-D", "2-D, pointwise, strided", "1-D"])
def test_it_compiles_without_a_break(name: str) -> None:
    layer, x = masked(name, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    torch.testing.assert_close(output, layer(x))
    before = layer.mask_codes.clone()
    layer.set_codes_(before.flip(1))
    torch.testing.assert_close(compiled(x), layer(x))
    assert not torch.equal(compiled(x), output)


@pytest.mark.parametrize("name", [name for name in LAYERS if "pointwise" not in name or "padded" in name])
@pytest.mark.parametrize(("autocast", "batched"), [(False, True), (True, True), (False, False)])
def test_a_double_pruned_input_gradient(name: str, autocast: bool, batched: bool) -> None:
    layer, x = masked(name, "double_pruned", torch.float32)
    x = x if batched else x[0]
    twin, backward_twin = dense_twin(layer), dense_twin(layer)
    torch.manual_seed(1)
    layer.set_backward_codes_(torch.randint(-(2**15), 2**15, layer.mask_codes.shape, dtype=torch.int16))
    kept = weight_of(st.decode_tiles(layer.mask_codes & layer.backward_codes), layer.weight.shape)
    backward_twin.weight.data.copy_(layer.weight.detach() * kept)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, forward, other = (
            module(input) for module, input in zip((layer, twin, backward_twin), inputs, strict=True)
        )
    direction = torch.randn_like(output)
    for result in (output, forward, other):
        result.backward(direction)
    tolerance = {"rtol": 2e-2, "atol": 3e-2} if autocast else {}
    torch.testing.assert_close(output, forward, **tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[2].grad, **tolerance)
    for mine, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **tolerance)


def test_an_adapter_adds_to_the_weight() -> None:
    for name in LAYERS:
        layer, x = masked(name)
        rows, columns = layer.matrix.shape
        down, up = torch.randn(2, columns, dtype=x.dtype), torch.randn(rows, 2, dtype=x.dtype)
        twin = dense_twin(layer)
        twin.weight.data += weight_of(up @ down, layer.weight.shape)
        layer.adapter = (down, up)
        torch.testing.assert_close(layer(x), twin(x))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    backend = SimulatedBackend()
    monkeypatch.setitem(BACKENDS, "simulated", backend)
    return backend


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolutions_run_on_sparse_products(
    simulated: SimulatedBackend, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3)).bfloat16().to(memory_format=layout)  # type: ignore[call-overload]
    report = st.sparsify_(model, "all-conv", backend="simulated", verbose=False)
    assert [choice.name for choice in report.sparse] == ["0", "2"]
    assert "kernel 3×3" in model[2].describe_products()
    twin = copy.deepcopy(model)
    st.export_dense_(twin)
    x = torch.randn(2, 16, 5, 5).bfloat16().contiguous(memory_format=layout)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):  # the second time, operands follow the weight
        output, expected = model(ours), twin(theirs)
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
        output.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=5e-2)
        for layer, other in zip(model[::2], twin[::2], strict=True):
            assert isinstance(layer, MaskedLayer)
            with torch.no_grad():
                layer.weight.mul_(1.5)
                other.weight.mul_(1.5)
        ours.grad, theirs.grad = None, None
    assert simulated.calls["product"] == 4  # forward and input gradient of the pointwise layer


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_gpu_finds_the_same_masks_and_gradients(name: str, layout: torch.memory_format) -> None:
    layer, x = masked(name)
    on_gpu = copy.deepcopy(layer).cuda()
    inputs = x.clone().requires_grad_(), x.cuda().requires_grad_()
    if x.dim() == 4:
        on_gpu = on_gpu.to(memory_format=layout)  # type: ignore[call-overload]
        inputs = inputs[0], x.cuda().contiguous(memory_format=layout).requires_grad_()
    on_gpu.set_codes_(st.transposable_codes(on_gpu.matrix.detach().abs()))
    assert torch.equal(on_gpu.mask_codes.cpu(), layer.mask_codes)
    outputs = layer(inputs[0]), on_gpu(inputs[1])
    direction = torch.randn_like(outputs[0])
    outputs[0].backward(direction)
    outputs[1].backward(direction.cuda())
    pairs = zip(inputs, (layer, on_gpu), outputs, strict=True)
    expected, found = ([output.detach(), x.grad, module.weight.grad] for x, module, output in pairs)
    assert_same_gradients(found, expected)
