"""Sparse products of a layer: their numbers, what they refuse, and how they compile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from packed_layers import layer, oracle
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.matmul.masked_matmul import masked_matmul
from sparsetrain.matmul.registry import operands_of

SHAPES = {"1-D": (32,), "2-D": (5, 32), "3-D": (2, 3, 32), "4-D": (2, 2, 3, 32)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_packed_layer_computes_what_a_masked_one_does(backend, shape, bias, dtype) -> None:
    sparse = layer(bias, dtype)
    x = torch.randn(SHAPES[shape], dtype=dtype, requires_grad=True)
    y = sparse(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    found = {"y": y, "dx": x.grad, "dw": sparse.weight.grad, "db": sparse.bias.grad if bias else None}
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for name, value in oracle(sparse, x.detach(), dy).items():
        if value is not None:
            assert found[name].dtype == dtype, name
            torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)
    assert backend.calls["product"] == 2


def test_autocast_packs_the_float32_master_in_the_compute_dtype(backend) -> None:
    sparse = layer()
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    half = (sparse.weight.detach() * sparse.mask).bfloat16()
    torch.testing.assert_close(y, F.linear(x.detach().bfloat16(), half, sparse.bias.detach().bfloat16()))
    y.float().sum().backward()
    assert sparse.weight.grad.dtype == sparse.bias.grad.dtype == x.grad.dtype == torch.float32
    assert all(tensor.dtype != torch.float32 for key in sparse.operands._made.values() for tensor in key.tensors)


def test_row_wise_masks_run_the_input_gradient_densely(backend) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    st.sparsify_(model, pattern="row_wise", backend="simulated", verbose=False)
    x = torch.randn(8, 32, requires_grad=True)
    y = model(x)
    y.backward(torch.ones_like(y))
    expected = oracle(model[0], x.detach(), torch.ones(8, 48))
    torch.testing.assert_close(y.double(), expected["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), expected["dx"], rtol=1e-5, atol=1e-5)
    assert backend.calls["product"] == 1


def test_layers_that_a_named_backend_cannot_run_are_masked_with_the_reason(backend) -> None:
    model = nn.Sequential(nn.Linear(32, 20), nn.Linear(20, 32), nn.Linear(32, 16))
    report = st.sparsify_(model, backend="simulated", verbose=False)
    products = [choice.products for choice in report.with_products(dict(model.named_children())).sparse]
    assert products[0] == "masked: shape is 20x32: simulated needs multiples of 16."
    assert products[2] == "not decided yet"
    x = torch.randn(4, 32)
    expected = x
    for entry in model:
        expected = F.linear(expected, entry.weight * entry.mask, entry.bias)
    torch.testing.assert_close(model(x), expected)
    assert backend.calls["product"] == 1


def test_a_backend_that_can_run_no_layer_is_refused_before_anything_is_changed(backend) -> None:
    model = nn.Sequential(nn.Linear(20, 48))
    optimizer = torch.optim.SGD(model.parameters())
    message = r"^backend is 'simulated' but shape is 48x20: .* multiples of 16\.$"
    with pytest.raises(ValueError, match=message):
        st.sparsify_(model, backend="simulated", verbose=False)
    with pytest.raises(ValueError, match=message):
        st.SparseTraining(model, optimizer, "fst", 10, backend="simulated", verbose=False)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="no CUDA GPU" if not torch.cuda.is_available() else "8.x"):
        st.sparsify_(nn.Sequential(nn.Linear(64, 64)), backend="cutlass", verbose=False)


def test_inputs_of_another_dtype_than_the_weight_are_refused(backend) -> None:
    with pytest.raises(ValueError, match=r"^input is torch.bfloat16 but weight is torch.float32: .* autocast\.$"):
        layer()(torch.randn(4, 32).bfloat16())


def test_a_product_without_a_layer_is_right_and_keeps_nothing(backend) -> None:
    weight = torch.randn(32, 16)
    codes = st.transposable_codes(weight.abs())
    rows = torch.randn(5, 32)
    found = masked_matmul(rows, weight, codes, None, "input_gradient", "simulated")
    torch.testing.assert_close(found, rows @ (weight * st.decode_tiles(codes)))
    assert operands_of(codes) is None


def test_no_tokens_are_no_problem(backend) -> None:
    x = torch.empty(0, 32, requires_grad=True)
    sparse = layer()
    sparse(x).sum().backward()
    assert x.grad.shape == (0, 32)
    assert torch.equal(sparse.weight.grad, torch.zeros(48, 32))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_activations_changes_nothing(backend, reentrant: bool) -> None:
    sparse = layer()
    other = copy.deepcopy(sparse)
    x = torch.randn(4, 32, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    sparse(x).square().sum().backward()
    checkpoint(other, again, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, again.grad)
    assert torch.equal(sparse.weight.grad, other.weight.grad)


class Allocations(TorchDispatchMode):
    """Entries of every new tensor that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[int] = []
        self._seen: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs, self._seen))
                 if isinstance(t, Tensor)}  # fmt: skip
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.entries.append(tensor.numel())
                self._seen.append(tensor)
        return result


def test_activations_are_not_copied(backend) -> None:
    sparse = layer()
    tokens = 1009  # no other tensor has a size like it
    x = torch.randn(1, tokens, 32, requires_grad=True)
    dy = torch.ones(1, tokens, 48)
    sparse(x).backward(dy)
    x.grad = None
    with Allocations() as forward:
        y = sparse(x)
    with Allocations() as backward:
        y.backward(dy)
    assert [size for size in forward.entries if size % tokens == 0] == [tokens * 48]  # y alone
    assert [size for size in backward.entries if size % tokens == 0] == [tokens * 32]  # dx alone


def test_compiles_into_one_graph_through_refreshes_repacks_and_token_counts(backend) -> None:
    sparse = layer()
    counter = CompileCounter()
    compiled = torch.compile(sparse, backend=counter, fullgraph=True, dynamic=True)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(8 + 8 * step, 32, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y.double(), oracle(sparse, x.detach(), y.detach())["y"], rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        optimizer.step()
        sparse.set_codes_(st.transposable_codes(sparse.weight.detach().abs()))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_aot_compilation_gives_the_same_gradients(backend) -> None:
    sparse = layer()
    x = torch.randn(8, 32, requires_grad=True)
    sparse(x).square().sum().backward()
    expected = x.grad.clone(), sparse.weight.grad.clone(), sparse.bias.grad.clone()
    x.grad = sparse.weight.grad = sparse.bias.grad = None
    torch.compile(sparse, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for found, wanted in zip((x.grad, sparse.weight.grad, sparse.bias.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


def test_the_operator_is_well_formed(backend) -> None:
    weight = torch.randn(32, 16)
    arguments = (
        torch.randn(5, 16),
        weight,
        st.transposable_codes(weight.abs()),
        torch.randn(32),
        "forward",
        "simulated",
    )
    torch.library.opcheck(torch.ops.sparsetrain.masked_matmul.default, arguments)


def test_training_equals_the_masked_backend(backend) -> None:
    def run(name: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        st.SparseTraining(model, optimizer, {"preset": "fst", "refresh_every": 3}, 12, backend=name, verbose=False)
        for _ in range(12):
            x = torch.randn(8, 32)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for ours, theirs in zip(run("simulated"), run("masked"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_are_refused_with_the_backend_that_has_them(backend) -> None:
    x = torch.randn(4, 32, requires_grad=True)
    with pytest.raises(
        RuntimeError, match=r"^backend is 'simulated' and a gradient of gradients .* backend='masked'\.$"
    ):
        torch.autograd.grad(layer()(x).sum(), x, create_graph=True)


def test_an_unknown_product_is_refused(backend) -> None:
    sparse = layer()
    with pytest.raises(ValueError, match=r"^product is 'backward': it must be one of 'forward', 'input_gradient'"):
        masked_matmul(torch.randn(4, 32), sparse.weight, sparse.mask_codes, None, "backward", "simulated")
