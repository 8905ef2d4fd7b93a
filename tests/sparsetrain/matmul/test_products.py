import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.matmul.execution import Execution
from sparsetrain.matmul.masked_matmul import masked_matmul
from sparsetrain.matmul.registry import operands_of

SHAPES = {"1-D": (32,), "2-D": (5, 32), "3-D": (2, 3, 32), "4-D": (2, 2, 3, 32)}


@pytest.fixture(params=[False, True], ids=["own order", "natural order"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimulatedBackend:
    simulated = SimulatedBackend(native=request.param)
    monkeypatch.setitem(BACKENDS, "simulated", simulated)
    return simulated


def layer(bias: bool = True, dtype: torch.dtype = torch.float32, **execution: bool) -> st.SparseLinear:
    model = nn.Sequential(nn.Linear(32, 48, bias=bias, dtype=dtype))
    st.sparsify_(model, backend="simulated", verbose=False, **execution)  # type: ignore[arg-type]
    return model[0]  # type: ignore[return-value]


def oracle(sparse: st.SparseLinear, x: Tensor, dy: Tensor) -> dict[str, Tensor | None]:
    """Output and straight-through gradients in float64."""
    weight = sparse.weight.detach().double() * sparse.mask
    rows, tokens = dy.double().reshape(-1, 48), x.double().reshape(-1, 32)
    return {
        "y": F.linear(x.double(), weight, None if sparse.bias is None else sparse.bias.detach().double()),
        "dx": dy.double() @ weight,
        "dw": rows.t() @ tokens,
        "db": None if sparse.bias is None else rows.sum(0),
    }


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


def test_operands_are_packed_once_a_step_and_shared_by_micro_batches(backend) -> None:
    sparse = layer()
    optimizer = torch.optim.AdamW(sparse.parameters(), fused=True)
    for step in range(3):
        for _ in range(4):
            x = torch.randn(8, 32, requires_grad=True)
            expected = oracle(sparse, x.detach(), torch.ones(8, 48))
            y = sparse(x)
            y.sum().backward()
            torch.testing.assert_close(y.double(), expected["y"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x.grad.double(), expected["dx"], rtol=1e-5, atol=1e-5)
        assert backend.calls["allocate"] == 2
        assert backend.calls["finish_"] == (0 if backend.native else 2 * (step + 1))
        optimizer.step()
        optimizer.zero_grad()


def new_weight(sparse: st.SparseLinear) -> None:
    with torch.no_grad():
        sparse.weight.copy_(torch.randn(48, 32))


def swap_through_data(sparse: st.SparseLinear) -> None:
    sparse.eval()
    sparse.weight.data.copy_(torch.randn(48, 32))  # as averaging callbacks do, around an evaluation


WRITES = {
    "copy_": new_weight,
    "load_state_dict": lambda sparse: sparse.load_state_dict({"weight": torch.randn(48, 32), "bias": torch.randn(48)}),
    "another tensor": lambda sparse: setattr(sparse.weight, "data", torch.randn(48, 32)),
    "another parameter": lambda sparse: setattr(sparse, "weight", nn.Parameter(torch.randn(48, 32))),
    "a refresh": lambda sparse: sparse.set_codes_(st.encode_tiles(st.transposable_mask(torch.rand(48, 32)))),
    "a swap around an evaluation": swap_through_data,
    "a foreach optimizer": lambda sparse: torch._foreach_add_([sparse.weight.detach()], 1.0),
    "a conversion": lambda sparse: (sparse.double().float(), new_weight(sparse)),
}


@pytest.mark.parametrize("write", WRITES)
def test_operands_follow_every_write(backend, write) -> None:
    sparse = layer()
    x = torch.randn(8, 32)
    before = sparse(x).detach()
    WRITES[write](sparse)
    after = sparse(x).detach()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after.double(), oracle(sparse, x, torch.zeros(8, 48))["y"], rtol=1e-5, atol=1e-5)


def test_a_bias_in_another_dtype_is_followed_too(backend) -> None:
    sparse = layer()
    x = torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        before = sparse(x).detach()
        with torch.no_grad():
            sparse.bias.add_(1)
        torch.testing.assert_close(sparse(x).detach(), before + 1, rtol=2e-2, atol=2e-2)


def test_packed_operands_take_nine_sixteenths_of_a_half_precision_weight_each(backend) -> None:
    sparse = layer(dtype=torch.bfloat16)
    sparse(torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert sparse.operands.bytes == 2 * (32 * 48 * 2) * 9 / 16
    sparse.operands.release()
    assert sparse.operands.bytes == 0


def test_the_transposed_operand_can_be_made_in_every_backward(backend) -> None:
    sparse = layer(keep_transposed=False)
    for _ in range(3):
        x = torch.randn(8, 32, requires_grad=True)
        y = sparse(x)
        y.backward(torch.ones_like(y))
        expected = oracle(sparse, x.detach(), torch.ones(8, 48))
        torch.testing.assert_close(x.grad.double(), expected["dx"], rtol=1e-5, atol=1e-5)
        assert [product for _, product, _ in sparse.operands._made] == ["forward"]
        assert backend.calls["allocate"] == 2
        assert sparse.operands.bytes == 32 * 48 * 4 / 2 + 32 * 48 / 16 * 2


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


def test_a_copy_has_operands_of_its_own(backend) -> None:
    sparse = layer()
    x = torch.randn(4, 32)
    sparse(x)
    other = copy.deepcopy(sparse)
    assert other.operands is not sparse.operands
    new_weight(other)
    torch.testing.assert_close(other(x).double(), oracle(other, x, torch.zeros(4, 48))["y"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sparse(x).double(), oracle(sparse, x, torch.zeros(4, 48))["y"], rtol=1e-5, atol=1e-5)


def test_operands_go_with_their_layer(backend) -> None:
    sparse = layer()
    sparse(torch.randn(4, 32))
    codes = sparse.mask_codes
    assert operands_of(codes) is sparse.operands
    del sparse
    gc.collect()
    assert operands_of(codes) is None


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


def test_training_releases_operands_in_dense_phases_and_repacks_in_place(backend) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
    optimizer = torch.optim.AdamW(model.parameters())
    method = {"preset": "fst", "warmup": 2, "dense_tail": 2, "refresh_every": 3}
    training = st.SparseTraining(model, optimizer, method, 10, backend="simulated", verbose=False)
    addresses, sizes = set(), []
    for _ in range(10):
        x = torch.randn(8, 32)
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
        made = model[0].operands._made.values() if training.phase != "dense" else ()
        addresses |= {tensor.data_ptr() for operand in made for tensor in operand.tensors}
        sizes.append(training.metrics()["operand_bytes"])
        if made:  # packed already, before the next forward asks
            count = backend.calls["finish_"]
            y = model[0](x).detach()
            assert backend.calls["finish_"] == count
            torch.testing.assert_close(y, F.linear(x, model[0].weight * model[0].mask, model[0].bias))
    assert sizes[:2] == [0, 0]
    assert sizes[-1] == 0
    assert max(sizes) > 0
    assert len(addresses) == 2  # values and metadata of W; nobody asks for the input's gradient
    assert training.metrics()["repack_ms"] >= 0
    assert {choice.products for choice in training.report.sparse} != {""}
    training.finish()
    assert type(model[0]) is nn.Linear
    assert not hasattr(model[0], "operands")


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


@pytest.mark.parametrize("managed", [False, True])
def test_a_bias_that_a_fused_optimizer_writes_is_followed(backend, managed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    if managed:
        st.SparseTraining(model, optimizer, {"preset": "fst", "dense_tail": 0}, 9, backend="simulated", verbose=False)
    else:
        st.sparsify_(model, backend="simulated", verbose=False)
    for _ in range(4):
        x = torch.randn(8, 32)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        expected = F.linear(x.bfloat16(), (model[0].weight * model[0].mask).bfloat16(), model[0].bias.bfloat16())
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        optimizer.zero_grad()
        (y.float() - 3).square().sum().backward()
        optimizer.step()


def test_weights_that_come_and_go_are_never_mistaken_for_each_other(backend) -> None:
    sparse = layer()
    x = torch.randn(8, 32)
    for number in range(20):
        weight = torch.full((48, 32), float(number))  # likely where the last one was
        found = torch.func.functional_call(sparse, {"weight": weight}, (x,))
        expected = F.linear(x, weight * sparse.mask, sparse.bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        del weight


def test_each_optimizers_step_counts_for_its_own_layers(backend) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    optimizers = [torch.optim.AdamW(entry.parameters(), lr=0.1, fused=True) for entry in model]
    st.SparseTraining(model, optimizers, {"preset": "fst", "dense_tail": 0}, 9, backend="simulated", verbose=False)
    x = torch.randn(8, 32)
    model(x).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        expected = x
        for entry in model:
            expected = F.linear(expected, entry.weight * entry.mask, entry.bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_model_may_be_evaluated_in_inference_mode_before_it_is_trained(backend) -> None:
    sparse = layer()
    with torch.inference_mode():
        sparse(torch.randn(8, 32))
    new_weight(sparse)
    x = torch.randn(8, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        sparse(x)
    y = sparse(x)
    y.sum().backward()
    torch.testing.assert_close(y.double(), oracle(sparse, x, y.detach())["y"], rtol=1e-5, atol=1e-5)


def test_only_a_change_of_mode_expires_operands(backend) -> None:
    sparse = layer()
    for _ in range(3):
        sparse.train()
        sparse(torch.randn(8, 32, requires_grad=True)).sum().backward()
    assert backend.calls["finish_"] == (0 if backend.native else 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "assigned weights"])
def test_compiled_copies_keep_their_operands(backend, how: str) -> None:
    sparse = layer()
    if how == "deepcopy":
        sparse = copy.deepcopy(sparse)
    elif how == "pickle":
        sparse = pickle.loads(pickle.dumps(sparse))
    else:
        sparse.load_state_dict({"weight": torch.randn(48, 32), "bias": torch.randn(48)}, assign=True)
    compiled = torch.compile(sparse, backend="eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 32)
        torch.testing.assert_close(compiled(x).double(), oracle(sparse, x, torch.zeros(8, 48))["y"],
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
    assert backend.calls["allocate"] == 1
    torch._dynamo.reset()


def test_moving_to_where_it_is_costs_nothing(backend) -> None:
    sparse = layer()
    sparse(torch.randn(8, 32))
    held = sparse.operands.bytes
    sparse.to("cpu")
    sparse(torch.randn(8, 32))
    assert sparse.operands.bytes == held > 0
    assert backend.calls["allocate"] == 1


def test_execution_is_a_value() -> None:
    assert copy.deepcopy(Execution("masked")) == Execution("masked")
