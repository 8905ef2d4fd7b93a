"""Input gradients through a weight that is pruned twice, on sparse backends against loops in float64."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import mlp, train
from oracles import two_of_those
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import sparsetrain as st
from sparsetrain.masks.patterns import DOUBLE_PRUNED, prune_again
from sparsetrain.matmul.masked_matmul import masked_matmul

SLOPE = {"preset": "slope", "refresh_every": 3, "adapter_rank": 0}


def dense_of(layer: st.SparseLinear) -> Tensor:
    """The input gradient's matrix by loops, given that backward codes are those of the weight as it is now."""
    weight = layer.weight.detach().double()
    return weight * two_of_those(weight, layer.mask)


def layer(dtype: torch.dtype = torch.float32, name: str = "simulated", **execution: bool) -> st.SparseLinear:
    """With a mask and a weight that is nowhere zero, what is pruned included."""
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    st.sparsify_(model, pattern="double_pruned", backend=name, verbose=False, **execution)  # type: ignore[arg-type]
    sparse = model[0]
    assert isinstance(sparse, st.SparseLinear)
    sparse.set_backward_codes_(prune_again(sparse.weight, sparse.mask_codes))
    return sparse


def input_gradient(sparse: nn.Module, dy: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*dy.shape[:-1], 32, dtype=dtype, requires_grad=True)
    sparse(x).backward(dy.to(dtype))
    assert x.grad is not None
    return x.grad


def test_the_second_search_keeps_two_of_every_four_and_what_the_mask_keeps_first() -> None:
    for weight in (torch.randn(32, 48), torch.randint(-1, 2, (32, 48)).float(), torch.zeros(8, 16)):
        codes = st.encode_tiles(st.nm_mask(weight.abs()))
        again = prune_again(weight, codes)
        assert (st.decode_tiles(again).view(-1, 4, weight.shape[1]).sum(1) == 2).all()
        assert int(DOUBLE_PRUNED.count_backward_violations(again)) == 0
        both = st.decode_tiles(again & codes)
        expected = torch.minimum(st.decode_tiles(codes).view(-1, 4, weight.shape[1]).sum(1), torch.tensor(2))
        assert torch.equal(both.view(-1, 4, weight.shape[1]).sum(1), expected)
        kept = two_of_those(weight, st.decode_tiles(codes))
        torch.testing.assert_close((weight * both).abs().sum(), (weight * kept).abs().sum())
    again[0, 0] ^= 1
    assert int(DOUBLE_PRUNED.count_backward_violations(again)) == 1


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_products_of_a_layer_see_their_own_matrix(backend, dtype: torch.dtype, keep: bool) -> None:
    sparse = layer(dtype, keep_transposed=keep)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for _ in range(3):
        x = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
        y = sparse(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected = F.linear(x.detach().double(), sparse.weight.double() * sparse.mask, sparse.bias.double())
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        expected = dy.double() @ dense_of(sparse)
        torch.testing.assert_close(x.grad.double(), expected, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            sparse.weight.copy_(torch.randn(48, 32))
        sparse.set_backward_codes_(prune_again(sparse.weight, sparse.mask_codes))
    assert backend.calls["product"] == 6
    assert backend.calls["allocate"] == 2


def test_positions_that_the_mask_prunes_hold_zeros(backend) -> None:
    sparse = layer()
    with torch.no_grad():
        sparse.weight[~sparse.mask] = float("nan")
    found = input_gradient(sparse, torch.randn(8, 48))
    assert torch.isfinite(found).all()
    (held,) = (made for (_, product, _), made in sparse.operands._made.items() if product == "input_gradient")
    kept = sparse.mask & st.decode_tiles(sparse.backward_codes)
    assert (held.tensors[0] != 0).sum() == (kept & (sparse.weight != 0)).sum()


def test_autocast_packs_both_in_the_compute_dtype(backend) -> None:
    sparse = layer()
    x = torch.randn(6, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    dy = torch.randn(6, 48)
    y.backward(dy.bfloat16())
    expected = dy.bfloat16() @ dense_of(sparse).bfloat16()
    torch.testing.assert_close(x.grad.bfloat16(), expected)
    assert backend.calls["product"] == 2
    assert "simulated" in sparse.describe_products()


@pytest.mark.parametrize("change", ["weight", "codes", "backward codes", "replaced"])
def test_operands_follow_every_write(backend, change: str) -> None:
    sparse = layer()
    dy = torch.randn(8, 48)
    before = input_gradient(sparse, dy)
    with torch.no_grad():
        if change == "weight":
            sparse.weight.mul_(2)
        elif change == "codes":
            sparse.set_codes_(st.encode_tiles(st.nm_mask(torch.rand(48, 32))))
        elif change == "backward codes":
            sparse.set_backward_codes_(prune_again(torch.rand(48, 32), sparse.mask_codes))
        else:
            sparse.backward_codes = prune_again(torch.rand(48, 32), sparse.mask_codes)
    kept = sparse.mask & st.decode_tiles(sparse.backward_codes)
    after = input_gradient(sparse, dy)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after.double(), dy.double() @ (sparse.weight.double() * kept), rtol=1e-5, atol=1e-5)
    assert backend.calls["allocate"] == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "double and back"])
def test_copies_and_conversions_keep_their_backward_codes(backend, how: str) -> None:
    sparse = layer()
    input_gradient(sparse, torch.randn(8, 48))
    other = (
        copy.deepcopy(sparse)
        if how == "deepcopy"
        else pickle.loads(pickle.dumps(sparse))
        if how == "pickle"
        else sparse.double().float()
    )
    with torch.no_grad():
        other.weight.add_(0.5 * other.weight)
    dy = torch.randn(8, 48)
    torch.testing.assert_close(input_gradient(other, dy).double(), dy.double() @ dense_of(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        input_gradient(sparse, dy).double(), dy.double() @ dense_of(sparse), rtol=1e-5, atol=1e-5
    )


def test_the_dense_product_behind_dispatch_sees_both_codes_too() -> None:
    sparse = layer(name="masked")
    rows, tokens = torch.randn(5, 48), torch.randn(5, 32)
    arguments = (sparse.weight.detach(), sparse.mask_codes)
    for _ in range(2):  # once made, once found
        found = masked_matmul(rows, *arguments, None, "input_gradient", "masked", sparse.backward_codes)
        torch.testing.assert_close(found.double(), rows.double() @ dense_of(sparse), rtol=1e-5, atol=1e-5)
        found = masked_matmul(tokens, *arguments, None, "forward", "masked", sparse.backward_codes)
        torch.testing.assert_close(found, F.linear(tokens, sparse.weight * sparse.mask), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            sparse.weight.mul_(-1)


def test_the_functional_form_needs_no_layer(backend) -> None:
    weight = torch.randn(48, 32)
    codes = st.encode_tiles(st.nm_mask(weight.abs()))
    again = prune_again(weight, codes)
    results = []
    for name in ("simulated", "masked"):
        x = torch.ones(4, 32, requires_grad=True)
        st.sparse_linear(
            x, weight, codes, backend=name, transposable=False, backward_codes=again
        ).square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)
    assert backend.calls["product"] == 2
    arguments = (torch.randn(5, 48), weight, codes, None, "input_gradient", "simulated", again)
    torch.library.opcheck(torch.ops.sparsetrain.masked_matmul.default, arguments)


def test_a_refresh_neither_recompiles_nor_moves_operands(backend) -> None:
    sparse = layer()
    counter = CompileCounter()
    compiled = torch.compile(sparse, backend=counter, fullgraph=True)
    addresses = set()
    for _ in range(4):
        dy = torch.randn(8, 48)
        found = input_gradient(compiled, dy)
        torch.testing.assert_close(found.double(), dy.double() @ dense_of(sparse), rtol=1e-5, atol=1e-5)
        addresses.add(tuple(tensor.data_ptr() for made in sparse.operands._made.values() for tensor in made.tensors))
        with torch.no_grad():
            sparse.weight.copy_(torch.randn(48, 32))
        sparse.set_backward_codes_(prune_again(sparse.weight, sparse.mask_codes))
    assert counter.frame_count == 1
    assert len(addresses) == 1
    torch._dynamo.reset()


METHODS = {
    "frozen": SLOPE,
    "frozen, the master left alone": st.Method(
        pattern="double_pruned", schedule=st.dense_prune_retrain(0), frozen_in_place=False, refresh_every=3
    ),
    "after a dense head": st.Method(pattern="double_pruned", schedule=st.dense_prune_retrain(4), refresh_every=3),
    "moving": st.Method(pattern="double_pruned", schedule=st.from_scratch(0, 0), refresh_every=3, decay=0.01),
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_training_equals_the_masked_backend_and_the_loops(backend, method: str, keep: bool) -> None:
    results = []
    for name in ("simulated", "masked"):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        training = st.SparseTraining(
            model, optimizer, METHODS[method], 12, backend=name, keep_transposed=keep, verbose=False
        )
        for step in range(12):
            train(model, optimizer, 1, start=step)
            last = model[2]
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step), requires_grad=True)
            packed, made = backend.calls["finish_"], bool(last.operands._made)
            last(x).sum().backward()
            assert not (keep and made) or backend.calls["finish_"] == packed  # packed at the end of the step already
            if training.phase == "dense":
                continue
            again = st.decode_tiles(last.backward_codes)
            assert (again.view(-1, 4, 32).sum(1) == 2).all()
            expected = torch.ones(4, 16).double() @ (last.weight.detach().double() * last.mask * again)
            torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)
            if training.clock % 3 == 0 and method.startswith("frozen"):  # found again just now
                torch.testing.assert_close(last.weight * last.mask * again, dense_of(last).float())
        assert training.sparse_flops_share == pytest.approx(2 / 3)
        results.append([parameter.detach().clone() for parameter in model.parameters()])
        training.finish()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert backend.calls["product"] > 4 * 8


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_loading_a_state_gives_the_same_gradients(backend, stop: int) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, SLOPE, 12, backend="simulated", verbose=False)
    train(model, optimizer, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    codes = model[2].backward_codes
    train(model, optimizer, 8 - stop, start=stop)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    model.load_state_dict(saved[0])  # into the run itself, whose operands are of other weights and codes
    optimizer.load_state_dict(saved[1])
    training.load_state_dict(saved[2])
    assert model[2].backward_codes is codes
    train(model, optimizer, 8 - stop, start=stop)
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_with_damaged_backward_codes_is_refused() -> None:
    model = mlp()
    training = st.SparseTraining(model, torch.optim.SGD(model.parameters()), SLOPE, 12, verbose=False)
    state: dict[str, Any] = training.state_dict()
    state["backward_codes"]["2"][0, 0] = 0
    before = model[2].backward_codes.clone()
    with pytest.raises(ValueError, match=r"^state's backward codes of layer '2' do not keep two of four along "):
        training.load_state_dict(state)
    assert torch.equal(model[2].backward_codes, before)
