"""Models of convolutions: which layers are chosen, how they train, and what their checkpoints hold."""

import copy

import pytest
import torch
from models import convnet, train
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.masks.matrices import weight_of


@pytest.mark.parametrize("preset", ["asp_one_shot", "fst", "sr_ste", "s_ste", "iterative"])
def test_memory_order_changes_no_training(preset: str) -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = convnet().double().to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        training = st.SparseTraining(model, optimizer, preset, 12, "all-conv", verbose=False)
        train(model, optimizer, 12)
        metrics = {key: value for key, value in training.metrics(per_layer=True).items() if not key.endswith("_ms")}
        results.append((metrics, {name: mask.clone() for name, mask in training.masks.codes.items()}, model))
    (metrics, codes, model), (other_metrics, other_codes, other) = results
    assert metrics == pytest.approx(other_metrics)
    assert all(torch.equal(codes[name], other_codes[name]) for name in codes)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_selection_says_why_a_convolution_stays_dense() -> None:
    class Special(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 8, 3),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "odd": nn.Conv1d(8, 6, 3),
            "special": Special(8, 8, 1),
            "fits": nn.Conv2d(8, 8, 3),
            "linear": nn.Linear(8, 8),
            "up": nn.ConvTranspose2d(8, 8, 2),
            "solid": nn.Conv3d(8, 8, 3),
        }
    )
    report = st.select_layers(model, "all-conv")
    assert {choice.name: choice.reason for choice in report.choices} == {
        "stem": "in_channels 3 is not a multiple of 4",
        "depthwise": "groups is 8, and a mask needs 1",
        "odd": "out_channels 6 is not a multiple of 4",
        "special": "subclass of nn.Conv2d (Special)",
        "fits": "",
        "linear": "not in targets",
    }
    assert [choice.name for choice in st.select_layers(model, ["all-conv", "all-linear"]).sparse] == ["fits", "linear"]
    assert [choice.name for choice in st.select_layers(model, "fits").sparse] == ["fits"]


def test_a_model_round_trips_and_a_failure_leaves_it_as_it_was() -> None:
    model = convnet()
    keys, classes = list(model.state_dict()), [type(layer) for layer in model]
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cusparselt"):
        st.sparsify_(model, "all-conv", backend="cusparselt", verbose=False)
    assert [type(layer) for layer in model] == classes
    st.sparsify_(model, "all-conv", verbose=False)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert st.export_dense_(model) == ["1", "3"]
    assert [type(layer) for layer in model] == classes
    assert (model[1].weight == 0).float().mean() == 0.5


def test_checkpoints_hold_masks_shaped_like_the_weights() -> None:
    model = convnet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, "sr_ste", 4, "all-conv", verbose=False)
    train(model, optimizer, 2)
    masks = st.read_masks({"sparsetrain": training.state_dict()})
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: layer.weight.shape for name, layer in training.masks.layers.items()
    }
    state = model.state_dict()
    weights = copy.deepcopy(state)
    pruned = st.detach_pruned(state, training.masks.layers)
    assert all(torch.equal(state[f"{name}.weight"], weights[f"{name}.weight"] * masks[name]) for name in masks)
    model.load_state_dict(state)
    st.restore_pruned_(training.masks.layers, training.masks.codes, pruned)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_state_of_another_kernel_is_refused() -> None:
    states = []
    for kernel in ((1, 4), (4, 1)):
        model = nn.Sequential(nn.Conv2d(4, 4, kernel))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training = st.SparseTraining(model, optimizer, "sr_ste", 4, "all-conv", verbose=False)
        states.append(training.state_dict())
    with pytest.raises(ValueError, match=r"'0' has a weight \[4, 4, 1, 4\] but the model's is \[4, 4, 4, 1\]"):
        training.load_state_dict(states[0])


@pytest.mark.parametrize("criterion", ["wanda", "weight_gradient", "fisher", "movement", "random"])
def test_criteria_score_convolutions(criterion: str) -> None:
    model = convnet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = {"preset": "sr_ste", "criterion": criterion, "pattern": "transposable", "decay": 0.0, "warmup": 1}
    training = st.SparseTraining(model, optimizer, method, 6, "all-conv", verbose=False)
    layer = training.masks.layers["1"]
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    before = layer.weight.detach().clone()
    train(model, optimizer, 1)
    gradient = layer.weight.grad
    found = training.masks.criterion.scores(layer.matrix.detach(), layer="1", clock=1)
    norms = seen[0].square().sum((0, 2, 3)).mul(0.1).sqrt()[None, :, None, None]
    expected = {
        "wanda": layer.weight.detach().abs() * norms,
        "weight_gradient": 0.1 * (before * gradient).abs(),
        "fisher": 0.1 * (before * gradient).square(),
        "movement": -before * gradient,
    }.get(criterion)
    if expected is not None:
        torch.testing.assert_close(weight_of(found, layer.weight.shape), expected)
    assert st.is_transposable(layer.mask.flatten(2).movedim(2, 0))


def test_only_pointwise_convolutions_count_as_sparse_work() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = st.SparseTraining(model, optimizer, "sr_ste", 4, "all-conv", verbose=False)
    assert training.method.pattern == "row_wise"  # one sparse product of three
    assert training.sparse_flops_share == pytest.approx(64 / (3 * (9 * 64 + 64 + 64)))


@pytest.mark.gpu
def test_pointwise_convolutions_train_on_a_gpu_by_measured_dispatch() -> None:
    losses = {}
    for backend in ("auto", "masked"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(256, 512, 1), nn.GELU(), nn.Conv2d(512, 256, 1)).cuda()
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        method = {"preset": "fst", "refresh_every": 5, "dense_tail": 0}
        training = st.SparseTraining(model, optimizer, method, 20, "all-conv", backend=backend, verbose=False)
        for step in range(20):
            x = torch.randn(8, 256, 16, 16, generator=torch.Generator().manual_seed(step)).cuda()
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = (model(x.contiguous(memory_format=torch.channels_last)) - x).float().square().mean()
            loss.backward()
            optimizer.step()
        assert training.metrics()["violations"] == 0
        losses[backend] = loss.item()
    assert losses["auto"] == pytest.approx(losses["masked"], rel=2e-2)
