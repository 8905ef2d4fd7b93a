import copy
from typing import Any

import pytest
import torch
from models import convnet, mlp, train

import sparsetrain as st
from sparsetrain.checkpoint import require_same_weights
from sparsetrain.layers.selection.select_layers import sparse_layers


def test_pruned_values_leave_and_return_bit_for_bit() -> None:
    model = mlp()
    st.sparsify_(model, verbose=False)
    model[0].weight.data[0, 0] = float("nan")
    masters = {name: value.clone() for name, value in model.state_dict().items()}
    weights = dict(model.state_dict())
    layers = dict(sparse_layers(model))
    pruned = st.detach_pruned(weights, layers)
    assert all(
        torch.equal(weights[f"{name}.weight"][~layer.mask], torch.zeros(layer.weight.numel() // 2))
        for name, layer in layers.items()
    )
    torch.testing.assert_close(model.state_dict(), masters, equal_nan=True)  # the model itself is untouched
    model.load_state_dict(weights)
    st.restore_pruned_(layers, {name: layer.mask_codes for name, layer in layers.items()}, pruned)
    torch.testing.assert_close(model.state_dict(), masters, rtol=0, atol=0, equal_nan=True)


def test_dense_phases_have_nothing_to_detach() -> None:
    model = mlp()
    st.sparsify_(model, phase="dense", verbose=False)
    weights = dict(model.state_dict())
    assert st.detach_pruned(weights, dict(sparse_layers(model))) == {}


def test_damaged_values_are_refused_before_any_weight_changes() -> None:
    model = mlp()
    st.sparsify_(model, verbose=False)
    layers = dict(sparse_layers(model))
    codes = {name: layer.mask_codes for name, layer in layers.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = torch.zeros(256)
    for pruned, words in (({"0": good, "2": good[1:]}, "'2' do not fit"), ({"0": good, "x": good}, "'x'")):
        with pytest.raises(ValueError, match=words):
            st.restore_pruned_(layers, codes, pruned)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_weights_of_another_model_are_named() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' is \(8, 16\) there and \(32, 16\) here"):
        require_same_weights(mlp(), mlp(hidden=8).state_dict())
    with pytest.raises(ValueError, match=r"'0\.bias' is only in the model"):
        require_same_weights(mlp(), mlp(bias=False).state_dict())
    require_same_weights(mlp(), mlp(bias=False).state_dict(), strict=False)


def test_reading_masks_needs_the_state() -> None:
    with pytest.raises(ValueError, match="sparsetrain"):
        st.read_masks({"state_dict": {}})


@pytest.mark.parametrize("preset", ["s_ste", "slope", "fst", "asp_one_shot"])
@pytest.mark.parametrize("build", [mlp, convnet])
def test_a_saved_model_computes_what_was_evaluated_and_its_master_comes_back(preset: str, build: Any) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    arguments = {"slope": {"adapter_start": 3, "adapter_rank": 2}, "asp_one_shot": {"prune_at": 2}}.get(preset, {})
    targets = "all-linear" if build is mlp else "all-conv"
    training = st.SparseTraining(model, optimizer, {"preset": preset, **arguments}, 30, targets, verbose=False)
    train(model, optimizer, 8)
    x = torch.randn(4, 16)
    expected, masters = model(x), copy.deepcopy(model.state_dict())
    weights = model.state_dict()
    pruned = st.detach_pruned(weights, training.masks.layers, merge_adapters=True)
    plain = build(seed=1)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
    model.load_state_dict(weights)
    st.restore_pruned_(training.masks.layers, training.masks.codes, pruned)
    for name, value in model.state_dict().items():
        assert torch.equal(value, masters[name]), name
