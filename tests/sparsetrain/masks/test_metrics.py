import numpy as np
import pytest
import torch

from sparsetrain import prune_metrics, transposable_mask
from sparsetrain.masks.metrics import magnitude_sums, total_metrics
from sparsetrain.masks.patterns import ROW_WISE, TRANSPOSABLE
from sparsetrain.masks.tile_codes import encode_tiles


def test_every_field_equals_its_definition() -> None:
    weight = torch.randn(16, 24)
    mask = transposable_mask(weight.abs())
    metrics = prune_metrics(weight, mask)
    w, m = weight.double().numpy(), mask.numpy()
    assert metrics.total_count == w.size
    assert metrics.pruned_count == (~m).sum()
    assert metrics.approximation_error == pytest.approx(np.abs(w - w * m).mean())
    assert metrics.kept_fraction == pytest.approx(np.abs(w * m).sum() / np.abs(w).sum())
    assert metrics.kept_magnitude_mean == pytest.approx(np.abs(w[m]).mean())
    assert metrics.pruned_magnitude_mean == pytest.approx(np.abs(w[~m]).mean())
    assert metrics.nonfinite_count == 0


def test_empty_sides_and_zero_weights_give_numbers() -> None:
    weight = torch.randn(4, 4)
    everything = prune_metrics(weight, torch.ones(4, 4, dtype=torch.bool))
    assert (everything.pruned_magnitude_mean, everything.kept_fraction, everything.approximation_error) == (0, 1, 0)
    nothing = prune_metrics(torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool))
    assert (nothing.kept_magnitude_mean, nothing.kept_fraction, nothing.pruned_count) == (0, 1, 16)


def test_non_finite_entries_are_counted_and_left_out_of_sums() -> None:
    weight = torch.tensor([[1.0, float("nan"), 3.0, float("inf")]])
    metrics = prune_metrics(weight, torch.tensor([[True, True, False, False]]))
    assert metrics.nonfinite_count == 2
    assert metrics.kept_fraction == 0.25


def test_totals_weigh_layers_by_their_entries() -> None:
    weights = [torch.randn(4, 4), torch.randn(8, 16)]
    masks = [torch.rand(w.shape) < 0.5 for w in weights]
    total = total_metrics([magnitude_sums(w, m) for w, m in zip(weights, masks, strict=True)])
    joined = prune_metrics(torch.cat([w.flatten() for w in weights]), torch.cat([m.flatten() for m in masks]))
    assert total.as_dict() == pytest.approx(joined.as_dict())


def test_a_mask_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(4, 4\)"):
        prune_metrics(torch.randn(4, 4), torch.ones(2, 4, dtype=torch.bool))


def test_violations_count_groups_that_do_not_keep_two() -> None:
    mask = transposable_mask(torch.randn(8, 8))
    assert TRANSPOSABLE.count_violations(encode_tiles(mask)) == 0
    for _ in range(50):
        broken = torch.rand(8, 12) < 0.5
        rows = int((broken.view(8, 3, 4).sum(-1) != 2).sum())
        columns = int((broken.t().reshape(12, 2, 4).sum(-1) != 2).sum())
        assert ROW_WISE.count_violations(encode_tiles(broken)) == rows
        assert TRANSPOSABLE.count_violations(encode_tiles(broken)) == rows + columns
