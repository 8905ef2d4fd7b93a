"""Packed operands of a layer: made once a step, and never older than the weight."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from packed_layers import layer, oracle
from torch import nn

import sparsetrain as st
from sparsetrain.matmul.execution import Execution
from sparsetrain.matmul.registry import operands_of


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
