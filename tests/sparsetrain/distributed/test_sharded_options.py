"""What a method can switch on trains on shards as in one process."""

import functools
import itertools
from typing import Any

import pytest
import sharded_runs
from crosses import crossed
from ranks import ranks

import sparsetrain as st

OPTIONS: dict[str, dict[str, Any]] = {
    "hysteresis": {"method": {"preset": "fst", "refresh_every": 2, "hysteresis": 0.3}},
    "tile budget": {"method": {"preset": "fst", "refresh_every": 2, "dense_budget": 0.3, "dense_unit": "tiles"}},
    "layer budget": {"method": {"preset": "asp_one_shot", "dense_budget": 0.3, "dense_unit": "layers"}},
    "wanda": {"method": {"preset": "asp_one_shot", "criterion": "wanda"}},
    "refit": {"method": {"preset": "asp_one_shot", "criterion": "wanda", "refit": True}},
    "fisher": {"method": {"preset": "fst", "warmup": 4, "criterion": "fisher", "refresh_every": 2}},
    "movement": {"method": {"preset": "asp_one_shot", "criterion": "movement"}},
    "random": {"method": {"preset": "fst", "criterion": "random", "refresh_every": 2, "hysteresis": 0.3}},
    "mvue": {"method": {"preset": "fst", "mvue": True, "refresh_every": 2}},
    "transposable s_ste": {"method": {"preset": "s_ste", "mvue": True, "pattern": "transposable"}},
    "automatic decay": {"method": {"preset": "fst", "decay": "auto", "warmup": 8, "refresh_every": 2}},
    "adapters": {"method": {"preset": "slope", "adapter_rank": 4, "adapter_start": 6}},
    "scaled gradients": {"method": {"preset": "fst", "gradient": st.scaled(1.0, 0.25)}},
    "ages": {"method": {"preset": "fst", "refresh_every": 2}, "track_age": True},
}


@functools.cache
def in_one_process(option: str, repeats: int = 1) -> dict[str, Any]:
    return sharded_runs.train(sharded_runs.blocks(), steps=16, loop={"repeats": repeats}, **OPTIONS[option])


OVER_REPLICAS = ("hysteresis", "tile budget", "wanda", "refit", "automatic decay")
"""What is added up, and has to leave replicas out."""


@pytest.mark.parametrize(
    ("shape", "option"),
    crossed(itertools.product([(2,), (2, 2)], OPTIONS), lambda shape, option: shape == (2,) or option in OVER_REPLICAS),
)
def test_an_option_on_shards_trains_as_in_one_process(shape: tuple[int, ...], option: str) -> None:
    size = 2 * len(shape)
    for found in ranks(size)("sharded_runs.fsdp", shape=shape, steps=16, **OPTIONS[option]):
        if option == "refit":  # which counts the tokens of all; its systems are solved in other batches
            sharded_runs.require_equal(found, in_one_process(option, size), 1e-5)
        else:
            sharded_runs.require_equal(found, in_one_process(option))
