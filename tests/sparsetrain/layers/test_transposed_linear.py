"""``Conv1D`` of transformers, a linear layer whose weight is stored [I, O], against the linear layers that equal it."""

import copy
import importlib
import pickle
import sys
from typing import Any

import pytest
import torch
from models import mlp, train
from oracles import brute_force_mask, two_of_four
from simulated_backend import SimulatedBackend
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import sparsetrain as st
from sparsetrain.backends import BACKENDS
from sparsetrain.layers.conversion import to_sparse_
from sparsetrain.layers.masked_layer import MaskedLayer


def transposed(model: nn.Module) -> nn.Module:
    """The model with a Conv1D of the same weight in place of every linear layer that is not tied."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            stored = Conv1D(layer.out_features, layer.in_features).to(layer.weight.dtype)
            stored.weight.data = layer.weight.detach().t().contiguous()
            stored.bias.data = layer.bias.detach().clone()
            model.set_submodule(name, stored)
    return model


def linear(model: nn.Module) -> nn.Module:
    """The model with a linear layer of the same weight in place of every Conv1D."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is Conv1D:
            plain = nn.Linear(layer.nx, layer.nf)
            plain.weight.data = layer.weight.detach().t().contiguous()
            plain.bias.data = layer.bias.detach().clone()
            model.set_submodule(name, plain)
    return model


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    none: dict[str, Any] = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2,
            **none, **{"loss_type": "ForCausalLMLoss"},
        )
    )  # fmt: skip


def as_stored(mask: Tensor, layer: nn.Module) -> Tensor:
    return mask.t() if isinstance(layer, Conv1D) else mask


def test_selection_finds_them_and_reports_output_by_input() -> None:
    model = gpt2()
    found = {choice.name: choice.shape for choice in st.select_layers(model, "mlp").sparse}
    assert found == {
        "transformer.h.0.mlp.c_fc": (64, 16),
        "transformer.h.0.mlp.c_proj": (16, 64),
        "transformer.h.1.mlp.c_fc": (64, 16),
        "transformer.h.1.mlp.c_proj": (16, 64),
    }
    report = st.select_layers(model, "all-linear")
    attention = {f"transformer.h.{block}.attn.{name}" for block in (0, 1) for name in ("c_attn", "c_proj")}
    assert {choice.name for choice in report.sparse} == {*found, *attention}
    assert report.summary().startswith("sparse layers: 8 of 9 || sparse weights: 6,144 of 6,656")


def test_selection_says_why_one_stays_dense() -> None:
    class Special(Conv1D):
        pass

    model = nn.ModuleDict(
        {"fits": Conv1D(8, 4), "odd": Conv1D(6, 4), "special": Special(8, 4), "conv": nn.Conv1d(4, 4, 1)}
    )
    assert {choice.name: choice.reason for choice in st.select_layers(model, "all-linear").choices} == {
        "fits": "",
        "odd": "nf 6 is not a multiple of 4",
        "special": "subclass of transformers' Conv1D (Special)",
        "conv": "not in targets",
    }


@pytest.mark.parametrize("pattern", ["transposable", "row_wise", "double_pruned"])
def test_masks_outputs_and_gradients_are_those_of_the_linear_layer(pattern: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(16, 8))
    x = torch.randn(2, 3, 8)
    weight = torch.randn(8, 16)
    model[0].weight.data.copy_(weight)
    st.sparsify_(model, pattern="row_wise" if pattern == "double_pruned" else pattern, verbose=False)
    layer = model[0]
    matrix = weight.t()
    search = (
        two_of_four
        if pattern != "transposable"
        else lambda w: torch.from_numpy(brute_force_mask(w.abs().double().numpy()))
    )
    mask = backward = search(matrix)
    assert layer.mask.shape == layer.weight.shape
    assert torch.equal(layer.mask.t(), mask)
    if pattern == "double_pruned":  # the input gradient sees fewer
        backward = mask & two_of_four((matrix * mask).t().contiguous()).t()
        layer.set_backward_codes_(st.encode_tiles(two_of_four((matrix * mask).t().contiguous()).t().contiguous()))
    ours = x.clone().requires_grad_()
    output = layer(ours)
    torch.testing.assert_close(output, x @ (weight * mask.t()) + layer.bias)
    direction = torch.randn_like(output)
    output.backward(direction)
    torch.testing.assert_close(ours.grad, direction @ (matrix * backward))
    dense = x.flatten(0, 1).t() @ direction.flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, dense)
    torch.testing.assert_close(layer.bias.grad, direction.sum((0, 1)))
    layer.weight.grad, layer.gradient = None, st.scaled(0.5, 0.25)
    layer(x).backward(direction)
    torch.testing.assert_close(layer.weight.grad, dense * torch.where(mask.t(), 0.5, 0.25))


RUNS: dict[str, dict[str, Any]] = {
    "asp_one_shot": {"prune_at": 4},
    "recommended": {"warmup": 2, "refresh_every": 2, "decay": 0.02, "freeze": 4},
    "fst": {"refresh_every": 3, "dense_tail": 2, "warmup": 2, "decay": 0.02, "mvue": True},
    "sr_ste": {"decay": 0.05, "criterion": "wanda", "warmup": 2},
    "sr_ste, SGD": {"decay": 0.05, "pattern": "transposable", "criterion": "movement", "warmup": 2},
    "s_ste": {"pattern": "transposable"},
    "s_ste, row-wise": {},
    "slope": {"refresh_every": 2, "adapter_start": 5, "adapter_rank": 2},
    "iterative": {"by": "density", "start": 3, "every": 3},
    "step": {"latest": 5, "earliest": 2, "decay": 0.01},
    "dense_to_sparse_finetune": {"decay": 0.02, "freeze_at": 7, "refresh_every": 2},
    "fst, dense tiles": {"refresh_every": 3, "dense_tail": 0, "dense_budget": 0.25, "dense_unit": "tiles"},
}
STEPS = 11


def start(name: str, model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, st.SparseTraining]:
    sgd = "SGD" in name
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if sgd
        else torch.optim.AdamW(model.parameters(), 1e-2)
    )
    method = {"preset": name.partition(",")[0], **RUNS[name]}
    return optimizer, st.SparseTraining(model, optimizer, method, STEPS, track_age=True, verbose=False, **options)


def plain(training: st.SparseTraining) -> dict[str, float]:
    return {key: value for key, value in training.metrics(per_layer=True).items() if not key.endswith("_ms")}


@pytest.mark.parametrize("name", RUNS)
def test_every_method_trains_it_as_the_linear_layer_and_resumes_bit_for_bit(name: str) -> None:
    twin = mlp()
    model = transposed(twin)
    optimizer, training = start(name, model)
    twin_optimizer, twin_training = start(name, twin)
    assert training.report.summary().startswith("sparse layers: 2 of 2")
    saved: Any = None
    for step in range(STEPS):
        if step == 6:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
        train(model, optimizer, 1, start=step)
        train(twin, twin_optimizer, 1, start=step)
        for own, other in zip(training.masks.layers.values(), twin_training.masks.layers.values(), strict=True):
            assert torch.equal(own.mask.t(), other.mask)
            torch.testing.assert_close(own.weight.t(), other.weight, rtol=1e-4, atol=2e-6)
    assert plain(training) == pytest.approx(plain(twin_training), rel=1e-4)
    again = transposed(mlp(seed=1))
    again.load_state_dict(saved[0])
    again_optimizer, resumed = start(name, again, state=saved[2])
    again_optimizer.load_state_dict(saved[1])
    train(again, again_optimizer, STEPS - 6, start=6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert plain(training) == plain(resumed)
    training.finish()
    twin_training.finish()
    assert type(model[0]) is Conv1D
    for own, other in zip(model[::2], twin[::2], strict=True):  # type: ignore[call-overload]
        assert torch.equal(own.weight.t() == 0, other.weight == 0)
        torch.testing.assert_close(own.weight.t(), other.weight, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    "method",
    [
        {"preset": "asp_one_shot", "prune_at": 3},
        {"preset": "recommended", "warmup": 0, "refresh_every": 2, "decay": 0.01},
        {"preset": "sr_ste", "decay": 0.01},
    ],
    ids=["one-shot", "moving", "moving, row-wise"],
)
def test_a_gpt2_trains_as_one_with_linear_layers(method: dict[str, Any]) -> None:
    model = gpt2()
    twin = linear(model)
    runs = []
    for own in (model, twin):
        optimizer = torch.optim.AdamW(own.parameters(), lr=2e-3)
        runs.append((own, optimizer, st.SparseTraining(own, optimizer, method, 8, verbose=False)))
    moved = 0
    before: list[Tensor] = []
    for step in range(8):
        tokens = torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(step))
        losses = []
        for own, optimizer, _ in runs:
            optimizer.zero_grad()
            loss = own(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
        masks = [[layer.mask for layer in training.masks.layers.values()] for *_, training in runs]
        assert len(masks[0]) == 8
        assert all(torch.equal(mask.t(), other) for mask, other in zip(*masks, strict=True))
        moved += sum(not torch.equal(mask, old) for mask, old in zip(masks[0], before, strict=False))
        before = [mask.clone() for mask in masks[0]]
    assert moved
    metrics = [training.metrics() for *_, training in runs]
    assert metrics[0]["violations"] == 0
    assert metrics[0]["kept_fraction"] == pytest.approx(metrics[1]["kept_fraction"], rel=1e-5)
    tokens = torch.randint(32, (2, 12))
    expected = model(tokens).logits
    runs[0][2].finish()
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    pruned = model.transformer.h[0].mlp.c_fc.weight.detach()
    assert type(model.transformer.h[0].mlp.c_fc) is Conv1D
    assert st.is_nm((pruned != 0).t())  # along the input features


@pytest.mark.parametrize("name", ["sr_ste", "s_ste, row-wise"])
def test_checkpoints_hold_what_is_evaluated_and_give_the_masters_back(name: str) -> None:
    model = transposed(mlp())
    optimizer, training = start(name, model)
    train(model, optimizer, 3)
    x = torch.randn(4, 16)
    expected = model(x)
    masks = st.read_masks({"sparsetrain": training.state_dict()})
    assert all(torch.equal(masks[name], layer.mask) for name, layer in training.masks.layers.items())
    state = model.state_dict()
    masters = copy.deepcopy(state)
    pruned = st.detach_pruned(state, training.masks.layers)
    fresh = transposed(mlp())
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-6)
    model.load_state_dict(state)
    st.restore_pruned_(training.masks.layers, training.masks.codes, pruned)
    assert all(torch.equal(value, masters[key]) for key, value in model.state_dict().items())


def test_a_state_of_the_other_way_to_store_weights_is_refused() -> None:
    states, runs = [], []
    for model in (mlp(16, 16), transposed(mlp(16, 16))):
        runs.append(start("sr_ste", model)[1])
        states.append(runs[-1].state_dict())
    for training, state, order in ((runs[0], states[1], "in, out"), (runs[1], states[0], "out, in")):
        with pytest.raises(ValueError, match=rf"'0' has a weight stored \[{order}\]"):
            training.load_state_dict(state)


def test_sparse_products_read_the_logical_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedBackend()
    monkeypatch.setitem(BACKENDS, "simulated", simulated)
    model = transposed(mlp(16, 48)).bfloat16()
    st.sparsify_(model, backend="simulated", verbose=False)
    assert "simulated" in repr(model[0].execution)
    twin = copy.deepcopy(model)
    st.export_dense_(twin)
    x = torch.randn(8, 16).bfloat16()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):  # the second time, operands follow the weight
        torch.testing.assert_close(model(ours), twin(theirs), rtol=2e-2, atol=2e-2)
        model(ours).sum().backward()
        twin(theirs).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=5e-2)
        ours.grad = theirs.grad = None
        with torch.no_grad():
            for own, other in zip(model[::2], twin[::2], strict=True):
                own.weight.mul_(1.5)
                other.weight.mul_(1.5)
        optimizer.step()
    assert simulated.calls["product"] == 12
    with pytest.raises(ValueError, match="shape is 24x8"):
        st.sparsify_(nn.Sequential(Conv1D(24, 8)), backend="simulated", verbose=False)


def test_compiled_whole_it_neither_breaks_nor_recompiles_at_a_search() -> None:
    model = transposed(mlp())
    optimizer, training = start("s_ste, row-wise", model)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for step in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            torch.testing.assert_close(compiled(x), model(x))
            train(compiled, optimizer, 1, start=step)
    assert training.clock == 3


def test_autocast_computes_as_for_a_linear_layer() -> None:
    twin = mlp()
    model = transposed(twin)
    x = torch.randn(4, 16)
    for own in (model, twin):
        st.sparsify_(own, verbose=False)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model(x), twin(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    expected.float().sum().backward()
    torch.testing.assert_close(model[0].weight.grad.t(), twin[0].weight.grad)


def test_it_stays_what_it_was_to_who_looks_at_it() -> None:
    model = transposed(mlp())
    keys = list(model.state_dict())
    st.sparsify_(model, verbose=False)
    assert list(model.state_dict()) == keys
    assert isinstance(model[0], Conv1D)
    assert isinstance(model[0], MaskedLayer)
    assert repr(model[0]) == "SparseTransposedLinear(nf=32, nx=16, phase=sparse)"
    assert type(model[0]) is type(to_sparse_(Conv1D(4, 4)))
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same[0]) is type(model[0])
        assert torch.equal(same[0].mask, model[0].mask)
        x = torch.randn(4, 16)
        assert torch.equal(same(x), model(x))
    assert st.export_dense_(model) == ["0", "2"]
    assert [type(layer) for layer in model[::2]] == [Conv1D, Conv1D]
    assert (model[0].weight == 0).float().mean() == 0.5


def test_everything_else_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transposed(mlp())
    st.sparsify_(model, verbose=False)
    written = pickle.dumps(model)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", None)  # as if it was not installed
    other = mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    training = st.SparseTraining(other, optimizer, "sr_ste", 4, verbose=False)
    assert len(training.report.sparse) == 2
    with pytest.raises(ImportError, match=r"transformers\.pytorch_utils"):
        pickle.loads(written)
    with pytest.raises(AttributeError, match="nonsense"):
        importlib.import_module("sparsetrain.layers.transposed_linear").nonsense  # noqa: B018


def test_one_step_by_hand() -> None:
    """AdamW with the decay on gradients, from the stored weight alone."""
    torch.manual_seed(0)
    layer = Conv1D(8, 4).double()
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    st.SparseTraining(model, optimizer, {"preset": "sr_ste", "decay": 0.5}, 4, verbose=False)
    x = torch.randn(5, 4).double()
    model(x).square().sum().backward()
    optimizer.step()
    mask = two_of_four(before.t()).t()
    gradient = x.t() @ (2 * (x @ (before * mask))) + 0.5 * ~mask * before
    update = 1e-2 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(layer.weight.detach(), before - update)
