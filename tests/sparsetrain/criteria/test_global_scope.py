"""Global scope: which layers or tiles stay dense under a budget, as functions and in training."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from models import mlp, train
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.criteria import keep_dense_layers, keep_dense_tiles
from sparsetrain.kernels.mask_search.reference import patterns

PATTERNS = patterns(2).numpy()


def brute_force_dense(scores: dict[str, Tensor], budget: float, rows_alone: bool) -> dict[str, np.ndarray]:
    ranked, dense = [], {}
    for index, (name, matrix) in enumerate(scores.items()):
        values = matrix.double().numpy()
        dense[name] = np.zeros((values.shape[0] // 4, values.shape[1] // 4), bool)
        for i, j in itertools.product(*map(range, dense[name].shape)):
            tile = values[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            kept = np.sort(tile, 1)[:, 2:].sum() if rows_alone else (PATTERNS * tile).sum((1, 2)).max()
            mean = np.abs(values).mean()
            loss = (tile.sum() - kept) / mean if mean else 0.0
            ranked.append((-np.round(loss, 9), index, i, j, name))
    for _, _, i, j, name in sorted(ranked)[: round(budget * len(ranked))]:
        dense[name][i, j] = True
    return dense


@pytest.mark.parametrize("budget", [0, 0.1, 0.37, 0.5, 1])
@pytest.mark.parametrize("pattern", ["transposable", "row_wise"])
def test_dense_tiles_equal_brute_force(pattern: str, budget: float) -> None:
    scores = {
        "first": torch.randn(8, 16).abs(),
        "loud": 1000 * torch.rand(16, 8),
        "signed": torch.randn(12, 12),
        "zero": torch.zeros(8, 8),
        "equal": torch.ones(8, 12),  # ties
        "half": torch.rand(4, 8).bfloat16(),
    }
    found = keep_dense_tiles(scores, budget, pattern)
    expected = brute_force_dense(scores, budget, pattern == "row_wise")
    assert list(found) == list(scores)
    for name in scores:
        assert np.array_equal(found[name].numpy(), expected[name]), name
    assert sum(int(tiles.sum()) for tiles in found.values()) == round(budget * 37)


def test_dense_tiles_refuse_what_does_not_fit() -> None:
    for budget in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"budget is .* 0 to 1"):
            keep_dense_tiles({"fc": torch.ones(4, 4)}, budget)
    with pytest.raises(ValueError, match="scores of layer 'fc' has shape"):
        keep_dense_tiles({"fc": torch.ones(4, 6)}, 0.5)
    with pytest.raises(ValueError, match="pattern is 'diagonal'"):
        keep_dense_tiles({"fc": torch.ones(4, 4)}, 0.5, "diagonal")
    assert keep_dense_tiles({}, 0.5) == {}
    assert keep_dense_layers({}, 0.5) == []


@pytest.mark.parametrize("budget", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("pattern", ["transposable", "row_wise"])
def test_dense_layers_are_the_costliest_that_fit(pattern: str, budget: float) -> None:
    scores = {"wide": torch.randn(8, 32).abs(), "loud": 1000 * torch.rand(8, 8), "flat": torch.ones(8, 8)}
    losses = {}
    for name, matrix in scores.items():
        values, lost = matrix.double().numpy(), 0.0
        for i, j in itertools.product(range(0, values.shape[0], 4), range(0, values.shape[1], 4)):
            tile = values[i : i + 4, j : j + 4]
            kept = np.sort(tile, 1)[:, 2:].sum() if pattern == "row_wise" else (PATTERNS * tile).sum((1, 2)).max()
            lost += tile.sum() - kept
        losses[name] = lost / values.sum()  # the same for every size of tile
    left, expected = budget * 384, []
    for name in sorted(losses, key=lambda name: -losses[name]):
        if scores[name].numel() <= left:
            expected.append(name)
            left -= scores[name].numel()
    assert keep_dense_layers(scores, budget, pattern) == [name for name in scores if name in expected]


def three_layers() -> nn.Sequential:
    """The middle one has equal magnitudes, so that a mask costs it most."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 16))
    with torch.no_grad():
        model[2].weight.copy_(0.1 * model[2].weight.sign())
    return model


def start(model: nn.Module, method: dict[str, Any], **options: Any) -> tuple[Any, st.SparseTraining]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, st.SparseTraining(model, optimizer, method, 12, verbose=False, **options)


def test_the_costliest_layer_stays_dense_for_the_whole_run() -> None:
    model = three_layers()
    schedule = {"phases": [{"kind": "dense", "length": 2}, {"kind": "sparse", "length": 6}, {"kind": "frozen"}]}
    method = {"schedule": schedule, "refresh_every": 2, "dense_budget": 0.45}
    optimizer, training = start(model, method)
    for step in range(12):
        phases = {name: layer.phase for name, layer in training.masks.layers.items()}
        expected = "dense" if step < 2 else "sparse" if step < 8 else "frozen"
        assert phases == {"0": expected, "2": "dense", "4": expected}, step
        train(model, optimizer, 1, start=step)
    assert training.metrics()["sparse_layers"] == 2
    training.finish()
    assert [float((model[index].weight == 0).float().mean()) for index in (0, 2, 4)] == [0.5, 0, 0.5]


def test_the_choice_of_layers_survives_a_checkpoint() -> None:
    model = three_layers()
    method = {"preset": "fst", "dense_budget": 0.45, "refresh_every": 2, "dense_tail": 0}
    optimizer, training = start(model, method)
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, 8, start=4)
    other = three_layers()
    with torch.no_grad():
        other[4].weight.fill_(1.0)  # would be the costliest now
    other.load_state_dict(saved[0])
    other_optimizer, resumed = start(other, method, state=saved[2])
    other_optimizer.load_state_dict(saved[1])
    assert [layer.phase for layer in resumed.masks.layers.values()] == ["sparse", "dense", "sparse"]
    train(other, other_optimizer, 8, start=4)
    assert all(torch.equal(mine, model.state_dict()[key]) for key, mine in other.state_dict().items())


def test_rounds_prune_the_layers_outside_of_the_budget() -> None:
    model = three_layers()
    method = {"preset": "iterative", "count": 2, "start": 2, "every": 4, "dense_budget": 0.45}
    optimizer, training = start(model, method)
    counts = []
    for step in range(12):
        counts.append(sum(layer.is_masked for layer in training.masks.layers.values()))
        train(model, optimizer, 1, start=step)
    assert counts == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert not training.masks.layers["2"].is_masked


def test_tiles_stay_dense_where_the_masks_of_that_moment_cost_most() -> None:
    model = mlp()
    method = {"preset": "fst", "dense_budget": 0.25, "dense_unit": "tiles", "refresh_every": 3, "dense_tail": 0}
    optimizer, training = start(model, method)
    seen = []
    for step in range(12):
        if training.refreshed:
            scores = {name: layer.weight.detach().abs() for name, layer in training.masks.layers.items()}
            dense = brute_force_dense(scores, 0.25, rows_alone=False)
            for name, layer in training.masks.layers.items():
                assert np.array_equal((layer.mask_codes == -1).numpy(), dense[name])
            seen.append(np.concatenate([tiles.flatten() for tiles in dense.values()]))
            assert training.metrics()["violations"] == 0
            assert training.metrics()["pruned_count"] == 0.75 * 0.5 * 1024
        train(model, optimizer, 1, start=step)
    assert len(seen) == 4
    assert (seen[0] != seen[-1]).any()  # they move
    assert training.sparse_flops_share == 0  # such layers have dense products
    assert training.report.sparse[0].products == "masked: its mask keeps more than 2:4"
    training.masks.layers["0"].mask_codes[0, 0] = 0x0F0F
    assert training.metrics()["violations"] == 4  # its rows; columns keep two


def test_layers_that_stay_dense_are_in_no_count() -> None:
    model = three_layers()
    optimizer, training = start(model, {"preset": "fst", "dense_budget": 0.45, "refresh_every": 2, "dense_tail": 0})
    for step in range(12):
        before = {name: layer.mask.clone() for name, layer in training.masks.layers.items()}
        train(model, optimizer, 1, start=step)
        if training.refreshed:
            flips = sum(int((layer.mask ^ before[name]).sum()) for name, layer in training.masks.layers.items())
            assert training.metrics()["flip_rate"] == pytest.approx(flips / (512 + 256))
    metrics = training.metrics(per_layer=True)
    assert metrics["pruned_count"] == (512 + 256) / 2
    assert metrics["total_count"] == 512 + 256
    assert "layer/2/flip_rate" not in metrics
    assert {choice.name: choice.reason for choice in training.report.choices} == {
        "0": "", "2": "kept dense by dense_budget=0.45", "4": "",
    }  # fmt: skip
    assert "sparse layers: 2 of 3" in training.report.summary()


def test_a_budget_below_the_smallest_layer_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dense_budget is 0\.1 but the smallest layer, '4', has 0\.200 of the weights"
    ):
        start(three_layers(), {"preset": "fst", "dense_budget": 0.1})


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ({"preset": "fst", "dense_budget": 1.0}, {}, "dense_budget is 1.0: it must be at least 0 and below 1"),
        ({"preset": "fst", "dense_unit": "rows"}, {}, "dense_unit is 'rows': it must be 'layers' or 'tiles'"),
        ({"preset": "slope", "dense_budget": 0.1, "dense_unit": "tiles"}, {}, "'double_pruned' .* use 'row_wise'"),
        (
            {"preset": "fst", "dense_budget": 0.1, "dense_unit": "tiles"}, {"backend": "cusparselt"},
            "backend is 'cusparselt' but dense_unit is 'tiles'",
        ),
    ],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(method: dict[str, Any], options: dict[str, Any], words: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=words):
        start(model, method, **options)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
