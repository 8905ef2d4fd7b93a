"""Masked layers under tensor parallelism, and with FSDP2 around it, train as in one process."""

import functools
import importlib.util
import itertools
from typing import Any

import parallel_runs
import pytest
import sharded_runs
import torch
from crosses import ON_FOUR, crossed
from ranks import ranks

from sparsetrain.methods import PRESETS
from sparsetrain.optim import SparseAdamW

LAYOUTS: dict[str, tuple[int, ...]] = {"tp": (2,), "fsdp and tp": (2, 2)}

CLOSE = 1e-6
"""Sums over processes are in another order."""

METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wanda": ({"preset": "asp_one_shot", "prune_at": 6, "criterion": "wanda"}, {"micro_batches": 2}),
    "movement": ({"preset": "fst", "refresh_every": 3, "warmup": 2, "dense_tail": 0, "criterion": "movement"}, {}),
    "fisher": ({"preset": "fst", "refresh_every": 3, "warmup": 3, "dense_tail": 0, "criterion": "fisher"}, {}),
    "weight_gradient": (
        {"preset": "sr_ste", "decay": 0.01, "warmup": 1, "criterion": "weight_gradient"},
        {"optimizer": SparseAdamW, "track_age": True},
    ),
    "random": ({"preset": "fst", "refresh_every": 3, "warmup": 2, "criterion": "random"}, {}),
    "automatic decay": ({"preset": "fst", "refresh_every": 2, "warmup": 4, "dense_tail": 0, "decay": "auto"}, {}),
    "frozen": ({"preset": "recommended", "warmup": 2, "refresh_every": 2, "decay": 0.01, "freeze": 6}, {}),
    "soft, transposable": ({"preset": "s_ste", "pattern": "transposable", "warmup": 2}, {}),
    "double-pruned": ({"preset": "slope", "refresh_every": 3, "adapter_rank": 0}, {}),
    "adapters": ({"preset": "slope", "refresh_every": 3, "adapter_start": 8, "adapter_rank": 2}, {}),
    "dense tiles": (
        {"preset": "fst", "refresh_every": 3, "dense_tail": 0, "dense_budget": 0.25, "dense_unit": "tiles"},
        {},
    ),
    "a dense layer": ({"preset": "asp_one_shot", "prune_at": 6, "dense_budget": 0.5}, {}),
    "packed": ({"preset": "fst", "refresh_every": 3, "warmup": 2, "decay": 0.01}, {"gather": "packed"}),
    "frozen moments": ({"preset": "step"}, {"track_age": True}),
}
"""Methods and options beside the presets as they are."""

GATHERED = ("adapters", "dense tiles", "packed")
"""Those that every run also tries where FSDP2 gathers what tensor parallelism leaves here."""


def size(shape: tuple[int, ...]) -> int:
    return int(torch.tensor(shape).prod())


@functools.cache
def preset_in_one_process(method: str) -> dict[str, Any]:
    return parallel_runs.train_part(sharded_runs.blocks(), method)


@pytest.mark.parametrize(
    ("layout", "method"),
    crossed(itertools.product(LAYOUTS, PRESETS), lambda layout, method: layout == "tp" or method in ON_FOUR),
)
def test_a_preset_trains_as_in_one_process(layout: str, method: str) -> None:
    shape = LAYOUTS[layout]
    for found in ranks(size(shape))("parallel_runs.tensor_parallel", method, shape):
        sharded_runs.require_equal(found, preset_in_one_process(method), CLOSE)


@pytest.mark.parametrize(
    ("layout", "name"),
    crossed(itertools.product(LAYOUTS, METHODS), lambda layout, name: layout == "tp" or name in GATHERED),
)
def test_a_method_trains_as_in_one_process(layout: str, name: str) -> None:
    (method, options), shape = METHODS[name], LAYOUTS[layout]
    wanted = parallel_runs.train_part(sharded_runs.blocks(), method, **options)
    for found in ranks(size(shape))("parallel_runs.tensor_parallel", method, shape, **options):
        sharded_runs.require_equal(found, wanted, CLOSE)


def test_rows_that_are_whole_are_refitted_and_others_named() -> None:
    method = {"preset": "asp_one_shot", "prune_at": 6, "refit": True}
    options = {"exclude": ["*.down"]}
    wanted = parallel_runs.train_part(sharded_runs.blocks(), method, **options)
    for found in ranks(2)("parallel_runs.tensor_parallel", method, (2,), **options):
        sharded_runs.require_equal(found, wanted, 1e-5)  # systems are solved in other batches
    for message in ranks(2)("parallel_runs.warned", method, (2,)):
        assert message.count("refit leaves layers '0.down', '1.down'") == 1


def test_a_copy_of_a_model_has_parts_of_its_own() -> None:
    assert ranks(2)("parallel_runs.copied") == [[True] * 4] * 2


@pytest.mark.parametrize("name", ["wanda", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_was_made_before_is_refused(layout: str, name: str) -> None:
    (method, options), shape = METHODS[name], LAYOUTS[layout]
    for message in ranks(size(shape))("parallel_runs.parallel_late", method, shape, **options):
        assert "came under tensor parallelism after its run was made" in message


@pytest.mark.parametrize(
    ("function", "shape"), [("distributed", (2, 2)), ("distributed", (2, 1, 2)), ("averaged_by_hand", (2, 2))], ids=str
)
def test_statistics_are_added_up_over_the_processes_that_share_gradients(function: str, shape: tuple[int, ...]) -> None:
    method = METHODS["wanda"][0]
    wanted = parallel_runs.train_part(sharded_runs.blocks(), method)
    for found in ranks(4)(f"parallel_runs.{function}", method, shape):
        sharded_runs.require_equal({**found, "losses": wanted["losses"]}, wanted, CLOSE)


def test_a_student_is_distilled_as_in_one_process() -> None:
    method = {"preset": "dense_to_sparse_finetune", "freeze_at": 9, "refresh_every": 2, "distillation": 0.3}
    wanted = parallel_runs.train_part(sharded_runs.blocks(), method)
    divergence = wanted["metrics"].pop("distillation")
    for found in ranks(2)("parallel_runs.tensor_parallel", method, (2,)):
        assert found["metrics"].pop("distillation") == pytest.approx(divergence, rel=1e-4)  # of nearly equal logits
        sharded_runs.require_equal(found, wanted, CLOSE)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("plan", parallel_runs.PLANS)
def test_a_plan_computes_what_one_process_does_with_the_messages_of_dense_layers(plan: str, bias: bool) -> None:
    x = torch.randn(2, 6, sharded_runs.WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = parallel_runs.one_step(parallel_runs.sequences(bias), True, x)
    for found, (dense, masked) in ranks(2)("parallel_runs.planned", plan, bias):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert masked == dense
        assert dense or "tokens" in plan


def test_a_replicated_weight_gets_the_sum_of_the_gradients_and_equal_masks() -> None:
    wanted = parallel_runs.in_one_process()
    for found, error in ranks(2)("parallel_runs.replicated"):
        sharded_runs.require_equal({**found, "losses": 0}, {**wanted, "losses": 0}, CLOSE)
        assert error.startswith("RuntimeError: masks of layer differ")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("cut", [0, 1], ids=["by inputs", "by outputs"])
def test_a_layer_that_is_stored_transposed_can_be_spread_by_hand(cut: int) -> None:
    for one, found in ranks(2)("parallel_runs.transposed", cut):
        torch.testing.assert_close(found, one)


def test_a_model_is_evaluated_compiled_checkpointed_and_exported() -> None:
    wanted = parallel_runs.used_in_one_process()
    width = sharded_runs.WIDTH
    half = {f"{block}.{name}.weight": width * width for block in (0, 1) for name in ("up", "gate", "down")}
    half["2.weight"] = width * width // 2
    for found in ranks(2)("parallel_runs.as_used"):
        sharded_runs.require_equal(found, wanted, CLOSE)
        assert found["input_features"] == width
        assert f"in_features={width}, out_features={2 * width}, bias=True, phase=sparse" in found["text"]
        assert dict(found["report"])["0.up"] == 2 * width * width
        assert found["ending"].startswith("ends 2:4: 50.0 % zeros in 7 layers")
        assert found["zeros"] == found["exported"] == half


def test_what_cannot_be_is_refused_in_one_sentence_on_every_rank() -> None:
    first, second = ranks(2)("parallel_runs.refusals")
    assert first == second
    assert first["convolution"].startswith("ValueError: layer '0' is a convolution whose weight tensor parallelism")
    assert first["plain input"].startswith("RuntimeError: layer 'SparseLinear' has a weight that is a DTensor but an")
    assert all(error.count(". ") == 0 and error.endswith(".") for error in first.values())


@pytest.mark.parametrize("cut", [0, 1], ids=["by outputs", "by inputs"])
def test_estimates_of_weight_gradients_are_right_and_each_part_draws_for_itself(cut: int) -> None:
    for alike, others in ranks(2)("parallel_runs.drawn", cut):
        assert torch.equal(alike[:8], alike[8:])  # without chance
        assert torch.equal(others[:8], others[8:]) is False
