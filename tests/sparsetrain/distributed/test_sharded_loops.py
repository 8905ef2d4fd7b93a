"""What a user's loop does around a step, on shards as in one process; and what travels."""

import functools
from typing import Any

import parallel_runs
import pytest
import sharded_loops
import sharded_runs
from ranks import ranks

import sparsetrain as st

METHODS = {
    "sparse": st.methods.fst(warmup=2, refresh_every=3, dense_tail=2),
    "frozen": st.methods.asp_one_shot(),
}

LOOPS: dict[str, dict[str, Any]] = {
    "two micro-batches": {"loop": {"micro_batches": 2}},
    "two micro-batches, one reduction": {"loop": {"micro_batches": 2, "syncs_each": False}},
    "an evaluation after every step": {"loop": {"evaluates": True}},
    "batches of three dimensions": {"loop": {"shape": (2, 3, sharded_runs.WIDTH)}},
    "weights that stay gathered": {"sharding": {"reshard_after_forward": False}},
    "fused AdamW": {"optimizer": functools.partial(sharded_runs.torch.optim.AdamW, fused=True)},
}

GATHERS = ["masked", "packed"]


@functools.cache
def in_one_process(loop: str, method: str) -> dict[str, Any]:
    options = {name: value for name, value in LOOPS[loop].items() if name != "sharding"}
    return sharded_runs.train(sharded_runs.blocks(), METHODS[method], steps=10, **options)


KINDS = [("sparse", "masked"), ("frozen", "packed"), *[
    pytest.param(*kind, marks=pytest.mark.sweep) for kind in (("frozen", "masked"), ("sparse", "packed"))
]]  # fmt: skip


@pytest.mark.parametrize(("method", "gather"), KINDS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_on_shards_trains_as_in_one_process(loop: str, method: str, gather: str) -> None:
    for found in ranks(2)("sharded_runs.fsdp", METHODS[method], (2,), steps=10, gather=gather, **LOOPS[loop]):
        sharded_runs.require_equal(found, in_one_process(loop, method))


@pytest.mark.parametrize("gather", GATHERS)
def test_clipped_gradients_differ_by_the_order_of_a_sum_alone(gather: str) -> None:
    method, loop = METHODS["sparse"], {"clip": 0.1}  # torch adds up the norm in another order
    wanted = sharded_runs.train(sharded_runs.blocks(), method, loop=loop)
    for found in ranks(2)("sharded_runs.fsdp", method, (2,), gather=gather, loop=loop):
        sharded_runs.require_equal(found, wanted, relative=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_both_wires_train_alike_in_bfloat16(method: str) -> None:
    masked, packed = (
        ranks(2)("sharded_runs.fsdp", METHODS[method], (2,), dtype="bfloat16", gather=gather)[0] for gather in GATHERS
    )
    sharded_runs.require_equal(packed, masked)


@pytest.mark.parametrize("gather", GATHERS)
def test_sparse_products_of_what_was_gathered(gather: str) -> None:
    wanted = in_one_process("fused AdamW", "sparse")
    found = ranks(2)("sharded_runs.simulated", METHODS["sparse"], gather=gather, **LOOPS["fused AdamW"])
    assert {result["used"] for result in found} == {gather == "packed"}
    for result in found:
        sharded_runs.require_equal(result, wanted, relative=1e-5)


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 17 / 32), (None, 33 / 64)])
def test_a_packed_weight_sends_what_is_kept_and_a_byte_a_tile(dtype: str | None, share: float) -> None:
    for sent in ranks(2)("sharded_runs.bytes_sent", dtype):
        assert sent["masked"]["sparse"] == sent["dense"]["sparse"]
        assert sent["packed"]["sparse"] == share * sent["dense"]["sparse"]
        assert sent["packed"]["other"] == sent["masked"]["other"] == sent["dense"]["other"] > 0


@pytest.mark.parametrize(
    ("gather", "method", "backend", "words"),
    [
        ("packed", "fst", "auto", "gathered packed"),
        ("masked", "fst", "auto", "gathered masked: gather is 'masked'"),
        ("auto", "fst", "auto", "gathered masked: its products are dense here, to which masked zeros cost less"),
        ("auto", "fst", "simulated", "gathered packed"),
        ("packed", "sr_ste", "auto", "gathered masked: its mask is not transposable"),
        ("packed", "slope", "auto", "gathered masked: its mask is not transposable"),
    ],
)
def test_the_report_says_how_weights_travel_and_why(gather: str, method: str, backend: str, words: str) -> None:
    for found in ranks(2)("sharded_runs.wires", gather, method, backend):
        assert len(found) == 1
        assert found.pop().startswith(words)


def test_an_unknown_wire_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gather is 'zipped': it must be one of .'auto', 'masked', 'packed'."):
        sharded_runs.train(sharded_runs.blocks(), "fst", gather="zipped")


def test_a_packed_weight_has_no_second_gradient() -> None:
    for found in ranks(2)("sharded_runs.second_gradient"):
        assert found.startswith("RuntimeError: gather is 'packed' and a gradient of gradients is asked for")


def test_a_model_that_is_sharded_late_is_gathered_packed_from_its_second_step() -> None:
    for found in ranks(2)("sharded_runs.wires_of_a_model_sharded_late"):
        assert found == [{"MaskedWire"}, {"PackedWire"}]


@pytest.mark.parametrize(("gather", "shards_teacher"), [("masked", True), ("packed", False)])
def test_a_student_is_distilled_as_in_one_process(gather: str, shards_teacher: bool) -> None:
    method = {"preset": "dense_to_sparse_finetune", "freeze_at": 9, "refresh_every": 2, "distillation": 0.3}
    teacher = sharded_loops.trained_teacher()
    wanted = parallel_runs.train_part(sharded_runs.blocks(), method, teacher=teacher)
    assert wanted["metrics"]["distillation"] > 0
    for found in ranks(2)("sharded_loops.distilled", method, gather, shards_teacher):
        sharded_runs.require_equal(found, wanted)


@pytest.mark.parametrize("gather", GATHERS)
def test_a_step_between_searches_sends_what_a_dense_one_does_and_metrics_one_message(gather: str) -> None:
    for found in ranks(2)("sharded_loops.messages", {"preset": "fst", "refresh_every": 4}, gather):
        assert found["sparse"] == found["dense"] != {}
        assert sum(found["metrics"].values()) == 1


@pytest.mark.parametrize(("gain", "criterion"), [([1.0, 1.0, 0.9, 1.1], "wanda"), ([1.0] * 4, "magnitude")])
def test_a_rank_whose_part_of_the_gains_is_alike_begins_as_the_others(gain: list[float], criterion: str) -> None:
    assert ranks(2)("sharded_runs.criterion_of", gain) == [criterion, criterion]
