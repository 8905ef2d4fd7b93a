import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import sparsetrain as st

SHAPES = {"1-D": (24,), "2-D": (5, 24), "3-D": (2, 3, 24), "4-D": (2, 2, 3, 24)}
RULES = {"ste": (1.0, 1.0), "masked": (1.0, 0.0), "scaled": (0.5, 0.25)}


def layer_and_oracle(rule: str, dtype: torch.dtype, bias: bool = True) -> tuple[st.SparseLinear, Tensor]:
    layer = st.SparseLinear(24, 16, bias=bias, dtype=dtype)
    mask = st.transposable_mask(layer.weight.detach().abs())
    layer.set_codes_(st.encode_tiles(mask))
    layer.gradient = st.scaled(*RULES[rule])
    return layer, mask


def dense_oracle(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, dy: Tensor, rule: str
) -> dict[str, Tensor | None]:
    """Output and gradients from the definitions, in float64."""
    x, weight, dy = x.double(), weight.double() * mask, dy.double()
    kept, pruned = RULES[rule]
    rows, tokens = dy.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    return {
        "y": torch.einsum("...i,oi->...o", x, weight) + (0 if bias is None else bias.double()),
        "dx": torch.einsum("...o,oi->...i", dy, weight),
        "dw": torch.einsum("to,ti->oi", rows, tokens) * torch.where(mask, kept, pruned),
        "db": None if bias is None else rows.sum(0),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_the_dense_masked_computation(shape, rule, dtype, bias) -> None:
    layer, mask = layer_and_oracle(rule, dtype, bias)
    x = torch.randn(SHAPES[shape], dtype=dtype, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = dense_oracle(x.detach(), layer.weight.detach(), layer.bias, mask, dy, rule)
    found = {"y": y, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad if bias else None}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in expected.items():
        if value is not None:
            assert found[name].dtype == dtype, name
            torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)


def test_pruned_weights_never_reach_the_output() -> None:
    layer, mask = layer_and_oracle("ste", torch.float32)
    x = torch.randn(5, 24)
    before = layer(x)
    with torch.no_grad():
        layer.weight[~mask] = float("nan")
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("rule", RULES)
def test_autocast_computes_what_a_masked_linear_under_autocast_computes(rule: str) -> None:
    layer, mask = layer_and_oracle(rule, torch.float32)
    x = torch.randn(6, 24, requires_grad=True)
    reference_x = x.detach().clone().requires_grad_()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = F.linear(reference_x, weight * mask, bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, reference_x.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=2e-2, atol=2e-2)
    scale = RULES[rule][0]
    torch.testing.assert_close(layer.weight.grad[mask], weight.grad[mask] * scale, rtol=2e-2, atol=2e-2)


def test_autocast_leaves_float64_alone() -> None:
    layer, _ = layer_and_oracle("ste", torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 24, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer, _ = layer_and_oracle("ste", torch.float32)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 24, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    checkpoint(other, x2, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, x2.grad)
    assert torch.equal(layer.weight.grad, other.weight.grad)
    assert torch.equal(layer.mask_codes, other.mask_codes)


def test_gradients_pass_gradcheck_where_the_mask_is_fixed() -> None:
    weight = torch.randn(8, 8, dtype=torch.float64)
    codes = st.encode_tiles(st.transposable_mask(weight.abs()))
    inputs = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: st.sparse_linear(x, w, codes, gradient="masked"), inputs)


def test_gradients_have_gradients() -> None:
    weight = torch.randn(8, 8, dtype=torch.float64)
    codes = st.encode_tiles(st.transposable_mask(weight.abs()))
    inputs = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True), weight.requires_grad_())
    masked = lambda x, w: st.sparse_linear(x, w, codes, gradient="masked")  # noqa: E731
    assert torch.autograd.gradgradcheck(masked, inputs)


def test_compiles_into_one_graph_and_follows_a_refresh_without_recompiling() -> None:
    layer, _ = layer_and_oracle("ste", torch.float32)
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, 24)
    compiled(x)
    layer.set_codes_(st.encode_tiles(st.transposable_mask(torch.rand(16, 24))))
    torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_state_dict_and_buffers_are_those_of_a_dense_layer_and_the_codes_follow_the_module() -> None:
    layer, _ = layer_and_oracle("ste", torch.float32)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert not list(layer.buffers())  # which data-parallel modules broadcast, and averages mix
    nn.Linear(24, 16).load_state_dict(layer.state_dict())
    assert layer.to(torch.bfloat16).mask_codes.dtype == torch.int16
    clone = copy.deepcopy(layer)
    assert isinstance(clone, st.SparseLinear)
    assert clone.mask_codes.data_ptr() != layer.mask_codes.data_ptr()


def test_a_dense_phase_is_a_plain_linear() -> None:
    layer, _ = layer_and_oracle("ste", torch.float32)
    layer.phase = "dense"
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert "phase=dense" in repr(layer)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: st.sparse_linear(torch.ones(8), w, torch.zeros(3, 2, dtype=torch.int16)), ["(3, 2)", "(2, 2)"]),
        (lambda w: st.sparse_linear(torch.ones(8), w, torch.zeros(2, 2)), ["float32", "int16"]),
        (
            lambda w: st.sparse_linear(torch.ones(8), w, torch.zeros(2, 2, dtype=torch.int16), gradient="x"),
            ["'x'", "ste"],
        ),
        (
            lambda w: st.sparse_linear(torch.ones(8), w, torch.zeros(2, 2, dtype=torch.int16), backend="x"),
            ["'x'", "masked"],
        ),
        (lambda w: st.SparseLinear(6, 8), ["(8, 6)", "multiples of 4"]),
        (lambda w: st.sparse_linear(torch.ones(2, 7), w, torch.zeros(2, 2, dtype=torch.int16)), ["(2, 7)", "(8, 8)"]),
    ],
)
def test_a_wrong_argument_is_named(call, words) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        call(torch.randn(8, 8))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_property_with_a_layers_name_does_not_hide_the_layer() -> None:
    class Model(nn.Module):
        fc = property(lambda self: self._modules["fc"].weight)

    model = Model()
    model._modules["fc"] = nn.Linear(8, 8)
    st.sparsify_(model, targets=["fc"], verbose=False)
    assert isinstance(model._modules["fc"], st.SparseLinear)
