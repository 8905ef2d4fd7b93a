"""What a run measures of its masks."""

import pytest
from models import sparse_run, train

import sparsetrain as st
from sparsetrain.methods import fst


def test_metrics_count_flips_against_the_masks_before() -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=2, dense_tail=0), track_age=True)
    assert "flip_rate" not in training.metrics()
    before = {name: layer.mask.clone() for name, layer in training.masks.layers.items()}
    train(model, optimizer, 2)
    after = {name: layer.mask for name, layer in training.masks.layers.items()}
    flips = sum(int((before[name] ^ after[name]).sum()) for name in before)
    metrics = training.metrics(per_layer=True)
    assert metrics["flip_rate"] == flips / 1024
    assert flips > 0
    assert metrics["age_mean"] == 1 - flips / 1024
    assert metrics["layer/0/flip_rate"] == int((before["0"] ^ after["0"]).sum()) / 512
    assert metrics["layer/0/kept_fraction"] == st.prune_metrics(model[0].weight, after["0"]).kept_fraction
    assert metrics["sparse_flops_share"] == pytest.approx(2 / 3)
