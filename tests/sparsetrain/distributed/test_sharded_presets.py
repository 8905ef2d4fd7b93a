"""Every preset on shards trains as in one process."""

import functools
import itertools
from typing import Any

import pytest
import sharded_runs
from crosses import ON_FOUR, crossed
from ranks import ranks

from sparsetrain.methods import PRESETS

LAYOUTS: dict[str, tuple[int, tuple[int, ...]]] = {"fsdp": (2, (2,)), "fsdp of 4": (4, (4,)), "hsdp": (4, (2, 2))}
"""Name to the number of ranks and the shape of their mesh."""


@functools.cache
def in_one_process(method: str) -> dict[str, Any]:
    return sharded_runs.train(sharded_runs.blocks(), method)


def _is_short(layout: str, gather: str, method: str) -> bool:
    # by the other wire, packing is no more than on two ranks
    return layout == "fsdp" or (gather == "masked" and method in ON_FOUR)


@pytest.mark.parametrize(
    ("layout", "gather", "method"), crossed(itertools.product(LAYOUTS, ("masked", "packed"), PRESETS), _is_short)
)
def test_a_preset_on_shards_trains_as_in_one_process(layout: str, gather: str, method: str) -> None:
    world, shape = LAYOUTS[layout]
    for found in ranks(world)("sharded_runs.fsdp", method, shape, gather=gather):
        sharded_runs.require_equal(found, in_one_process(method))
