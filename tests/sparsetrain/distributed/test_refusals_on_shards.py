"""What cannot run on shards is refused with one sentence, on every rank, and leaves everything as it was."""

import re

import pytest
import torch
from ranks import ranks
from torch import nn

import sparsetrain as st

MISALIGNED = r"^ValueError: layer '{layer}' cannot be sharded like this: {cut}, which cut through 4×4 tiles: use fewer"

MODELS = {
    "rows": (2, MISALIGNED.format(layer="0.0", cut="20 rows over 2 processes are parts of 10")),
    "rows under HSDP": (4, MISALIGNED.format(layer="0.0", cut="20 rows over 2 processes are parts of 10")),
    "columns": (2, MISALIGNED.format(layer="0.1", cut="20 columns over 2 processes are parts of 10")),
    "both": (4, MISALIGNED.format(layer="0", cut="24 rows over 4 processes are parts of 6")),
    "own root": (2, r"^ValueError: layer '0.up' is a root of its own .* apply fully_shard to the block around it"),
    "some plain": (2, r"layer '0.up' .*Shard\(dim=0\).* over \(2,\) processes but '1.up' .* plain: shard all sparse"),
    "two meshes": (4, r"layer '0.up' .* over \(4,\) processes but '1.up' .* over \(2, 2\) processes: shard all sparse"),
    "offload": (2, r"layer '0.up' is sharded with offload_policy=CPUOffloadPolicy\(.*use OffloadPolicy\(\)"),
    "part of the mesh": (4, r"layer '0.up' is sharded with reshard_after_forward=2, .*: use True or False"),
    "fsdp1": (2, r"model is wrapped in FSDP1: .* through 4×4 tiles, so use fully_shard \(FSDP2\) or DDP"),
}
"""Name in ``refused_runs`` to the number of ranks and the message."""


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_no_run_can_train_is_refused_on_every_rank(model: str) -> None:
    world, message = MODELS[model]
    for found in ranks(world)("refused_runs.refusal", model):
        assert re.search(message, found), found


@pytest.mark.parametrize("model", ["rows", "own root", "some plain", "offload"])
def test_a_model_that_is_sharded_during_its_run_is_refused_at_the_next_step(model: str) -> None:
    message = MODELS[model][1].replace("'0.0'", "'SparseLinear'")
    for found in ranks(2)("refused_runs.sharded_afterwards", model):
        assert re.search(message, found), found


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            "sharded",
            "distillation",
            r"distillation is 0.5 and teacher is None but weights are sharded, .* pass a teacher",
        ),
        ("by columns", "wanda", r"criterion is 'wanda' but weights are sharded, and weights are cut by columns"),
    ],
)
def test_what_is_not_proven_on_shards_is_refused(model: str, options: str, message: str) -> None:
    for found in ranks(2)("refused_runs.refusal", model, options):
        assert re.search(message, found), found


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("plain", "length", "total_steps is 12 on rank 0 but 13 on rank 1: processes that train together must"),
        ("sharded", "method", r"method\['refresh_every'\] is 4 on rank 0 but 5 on rank 1"),
        ("plain", "layers", r"layers\['1.gate'\] is \[32, 16\] on rank 0 but missing on rank 1"),
        ("sharded", "layers", r"layers\['1.gate'\] is \[32, 16\] on rank 0 but missing on rank 1"),
        ("plain", "one state", "goes on is False on rank 0 but True on rank 1"),
        ("plain", "other state", "clock is 0 on rank 0 but 1 on rank 1"),
    ],
)
def test_ranks_that_set_up_other_runs_are_told_in_what_they_differ(model: str, options: str, message: str) -> None:
    for found in ranks(2)("refused_runs.refusal", model, options):
        assert re.search(f"^ValueError: {message}", found), found


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("sharded", "bad argument", "backend is 'nothing': it must be one of"),
        ("plain", "no method", "method is 7"),
        ("plain", "damaged state", "state has version 99"),
    ],
)
def test_what_one_rank_cannot_set_up_no_rank_sets_up(model: str, options: str, message: str) -> None:
    first, second = ranks(2)("refused_runs.refusal", model, options)
    assert re.match(f"RuntimeError: rank 1 could not set up the (run|state): .*{message}", first), first
    assert re.match(f"(Value|Type)Error: .*{message}", second), second


def test_states_that_differ_are_refused_and_nothing_is_loaded() -> None:
    (first, clock), (second, _) = ranks(2)("refused_runs.loaded", True)
    assert first.startswith("RuntimeError: rank 1 could not set up the state")
    assert second.startswith("ValueError")
    assert clock == 0
    for message, _ in ranks(2)("refused_runs.loaded", False):
        assert "last_refresh is 0 on rank 0 but -1 on rank 1" in message


def test_a_layer_that_stays_dense_may_be_sharded_as_it_likes() -> None:
    for found in ranks(2)("refused_runs.head_of_its_own"):
        assert "3" not in found
        assert "0.up" in found


def test_a_run_of_a_part_of_what_is_gathered_is_refused() -> None:
    for message in ranks(2)("refused_runs.part_of_a_root"):
        assert "layer 'up' is sharded by a fully_shard that was applied to a module above" in message


def test_verify_says_that_it_needs_whole_weights() -> None:
    for message in ranks(2)("refused_runs.verified"):
        assert message.startswith("ValueError: layer '0.up' is sharded, and verify() needs whole weights")


class DeepSpeedEngine(nn.Module):
    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedZeroOptimizer:
    __module__ = "deepspeed.runtime.zero.stage_1_and_2"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_deepspeed_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    message = "is of DeepSpeed, whose optimizer steps flat partitions .* DistributedDataParallel with ZeroRedundancy"
    with pytest.raises(ValueError, match=f"DeepSpeedEngine {message}"):
        st.SparseTraining(DeepSpeedEngine(model), optimizer, "fst", 12)
    wrapped: object = DeepSpeedZeroOptimizer(optimizer)
    with pytest.raises(ValueError, match=f"DeepSpeedZeroOptimizer {message}"):
        st.SparseTraining(model, wrapped, "fst", 12)  # type: ignore[arg-type]
    model[0].weight.ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3, which cuts flat parameters anywhere"):
        st.sparsify_(model)
    assert type(model[0]) is nn.Linear
