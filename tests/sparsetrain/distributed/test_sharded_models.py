"""Kinds of models, and what is done to a model around its sharding, train as in one process."""

import functools
import itertools
from typing import Any

import pytest
import sharded_models
import sharded_runs
from crosses import crossed
from ranks import ranks

MODELS = [model.__name__ for model in sharded_models.MODELS]

GATHERS = ["masked", "packed"]


@functools.cache
def in_one_process(model: str, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = getattr(sharded_models, model)(lambda model: model, **options)
    return found


NEVER_PACKED = ("convolutions", "double_pruned_convolutions", "transposed")
"""Whose weights travel masked in any case."""


@pytest.mark.parametrize(
    ("model", "gather"),
    crossed(
        itertools.product(MODELS, GATHERS),
        lambda model, gather: gather == "masked" or model not in (*NEVER_PACKED, "compiled"),
    ),
)
def test_a_model_on_shards_trains_as_in_one_process(model: str, gather: str) -> None:
    for found in ranks(2)("sharded_models.on_shards", model, gather):
        sharded_runs.require_equal(found, in_one_process("plain" if model == "compiled" else model))


@pytest.mark.parametrize("gather", GATHERS)
def test_weights_may_be_cut_by_input_features(gather: str) -> None:
    for found in ranks(2)("sharded_models.on_columns", gather):
        sharded_runs.require_equal(found, in_one_process("plain"))


@pytest.mark.parametrize("method", ["fst", "slope"])
@pytest.mark.parametrize("gather", GATHERS)
def test_a_mesh_of_one_process(gather: str, method: str) -> None:
    for found in ranks(2)("sharded_models.on_one_rank", gather, method):
        sharded_runs.require_equal(found, in_one_process("plain", method=method))


@pytest.mark.parametrize(
    ("gather", "words"),
    [("masked", "layer '0.up' was gathered without its mask"), ("packed", "expected an out= argument")],
)
def test_a_weight_that_is_gathered_without_its_mask_is_an_error_on_every_rank(gather: str, words: str) -> None:
    for found in ranks(2)("sharded_models.without_hooks", gather):
        assert words in found  # the second is torch's, whose buffers have another size


def test_who_reads_a_packed_weight_finds_no_numbers() -> None:
    assert ranks(2)("sharded_models.what_a_reader_finds") == [(True, False)] * 2
