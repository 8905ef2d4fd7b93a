"""Every preset on shards trains as in one process."""

import functools
from typing import Any

import pytest
import sharded_runs
from ranks import ranks

from sparsetrain.methods import PRESETS

LAYOUTS: dict[str, tuple[int, tuple[int, ...]]] = {"fsdp": (2, (2,)), "fsdp of 4": (4, (4,)), "hsdp": (4, (2, 2))}
"""Name to the number of ranks and the shape of their mesh."""


@functools.cache
def in_one_process(method: str) -> dict[str, Any]:
    return sharded_runs.train(sharded_runs.blocks(), method)


SHORT = [("fsdp", "masked"), ("fsdp", "packed"), ("hsdp", "masked")]
"""What every run of the tests has; by the other wire, packing is no more than on two ranks."""

ON_FOUR = ("fst", "s_ste", "slope")
"""Those that every run tries on four shards: one a search, one a soft threshold, one two masks a layer."""


def _is_short(layout: str, gather: str, method: str) -> bool:
    return (layout, gather) in SHORT or (layout == "fsdp of 4" and gather == "masked" and method in ON_FOUR)


ALL = [
    pytest.param(layout, gather, method, marks=[] if _is_short(layout, gather, method) else pytest.mark.sweep)
    for layout in LAYOUTS
    for gather in ("masked", "packed")
    for method in PRESETS
]


@pytest.mark.parametrize(("layout", "gather", "method"), ALL)
def test_a_preset_on_shards_trains_as_in_one_process(layout: str, gather: str, method: str) -> None:
    world, shape = LAYOUTS[layout]
    for found in ranks(world)("sharded_runs.fsdp", method, shape, gather=gather):
        sharded_runs.require_equal(found, in_one_process(method))
