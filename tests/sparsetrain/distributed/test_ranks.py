"""Replicas under ``DistributedDataParallel`` stay equal, and a difference is found."""

import pytest
import torch
from ranks import ranks

from sparsetrain.distributed.equal_codes import require_equal_codes


@pytest.mark.parametrize("backend", ["masked", "simulated"])
def test_ranks_agree_on_masks_and_a_difference_is_an_error_on_every_rank(backend: str) -> None:
    first, second = ranks(2)("replicas.trained_then_changed", backend)
    assert list(first["codes"]) == ["0", "2"]
    for part in ("codes", "weights"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    for found in (first, second):
        assert "masks of 2 differ between data-parallel ranks" in found["message"]


def test_sparse_layers_may_be_wrapped() -> None:
    first, second = ranks(2)("replicas.wrapped_when_sparse")
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_one_process_compares_nothing() -> None:
    require_equal_codes({"fc": torch.zeros(1, 1, dtype=torch.int16)}, {"fc": ()})


@pytest.mark.parametrize("under_fsdp", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_adapters_are_clipped_by_the_same_norm_on_every_rank(micro_batches: int, under_fsdp: bool) -> None:
    first, second = ranks(2)("sharded_runs.clipped_adapters", micro_batches, under_fsdp)
    assert first[0] == second[0]
    assert all(map(torch.equal, first[1], second[1]))
    assert any(part.abs().sum() > 0 for part in first[1][1:14:2])  # adapters have moved
