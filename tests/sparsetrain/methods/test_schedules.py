from dataclasses import replace

import pytest
import torch
from models import mlp

from sparsetrain import Magnitude, Method, Phase, Schedule, SparseTraining, dense_prune_retrain, from_scratch
from sparsetrain.methods import PRESETS, asp_one_shot, fst, iterative, recommended, resolve_method, slope


def kinds(schedule: Schedule, total: int | None) -> str:
    timeline = schedule.resolve(total)
    return "".join(timeline.at(step)[0][0] for step in range(12))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (from_scratch(0.0, 1 / 6), "ssssssssssdd"),
        (from_scratch(0.25, 0.25), "dddssssssddd"),
        (from_scratch(2, 1), "ddsssssssssd"),
        (from_scratch(0, 0), "ssssssssssss"),
        (from_scratch(1, 2, 0.25), "dssssssfffdd"),
        (recommended(0.25, freeze=4).schedule, "dddsssssffff"),
        (dense_prune_retrain(0.5), "ddddddffffff"),
        (dense_prune_retrain(0), "ffffffffffff"),
        (dense_prune_retrain(1.0), "dddddddddddd"),
        (Schedule((Phase("dense", 2), Phase("sparse", 0.5), Phase("frozen"))), "ddssssssffff"),
    ],
)
def test_phases_in_steps_and_fractions(schedule: Schedule, expected: str) -> None:
    assert kinds(schedule, 12) == expected


def test_steps_need_no_total_and_the_last_phase_goes_on() -> None:
    assert kinds(dense_prune_retrain(3), None) == "dddfffffffff"
    assert from_scratch(0.0, 0.5).resolve(4).at(1000)[0] == "dense"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_scratch(warmup=-1), ["warmup is -1", "at least 0"]),
        (lambda: from_scratch(tail=1.5), ["tail is 1.5", "from 0 to 1"]),
        (lambda: dense_prune_retrain(True), ["prune_at is True"]),
        (lambda: Phase("spars", 3), ["'spars'", "frozen"]),
        (lambda: Phase("frozen", 3, kept=1), ["kept is 1", "2 or 3"]),
        (lambda: iterative(3, by="density"), ["count is 3", "3:4 and 2:4"]),
        (lambda: iterative(by="rows"), ["by is 'rows'", "'layers' or 'density'"]),
        (lambda: replace(slope(), schedule=iterative(by="density").schedule), ["'double_pruned'", "'row_wise'"]),
        (lambda: Schedule(()), ["no phases"]),
        (lambda: Schedule((Phase("dense"), Phase("sparse"))), ["more than one phase without a length"]),
        (lambda: from_scratch(0.1).resolve(None), ["total_steps is None", "fractions"]),
        (lambda: from_scratch(8, 8).resolve(12), ["16 steps", "12"]),
        (lambda: from_scratch().resolve(0), ["total_steps is 0"]),
        (lambda: fst(refresh_every=0), ["refresh_every is 0"]),
        (lambda: fst(decay=-1.0), ["decay is -1.0"]),
        (lambda: fst(decay=float("nan")), ["decay is nan"]),
        (lambda: fst(pattern="1:3"), ["'1:3'", "transposable"]),
        (lambda: fst(criterion="size"), ["'size'", "magnitude"]),
        (lambda: resolve_method("fts"), ["'fts'", "'fst'", "'asp_one_shot'"]),
        (lambda: resolve_method({"preset": "fst", "warmpu": 1}), ["'warmpu'", "warmup"]),
        (lambda: resolve_method({"patern": "x"}), ["'patern'", "pattern"]),
        (
            lambda: resolve_method({"preset": "fst", "warmup": 0.5, "schedule": [{"kind": "sparse"}]}),
            ["'schedule' is given", "warmup", "leave one"],
        ),
        (
            lambda: resolve_method({"preset": "fst", "mvue": True, "weight_product": "dense"}),
            ["'weight_product' is given", "mvue"],
        ),
        (lambda: resolve_method({"schedule": [{"kind": "sparse", "keep": 3}]}), ["no 'keep'", "kept"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(call, words) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_method_is_a_name_a_mapping_or_itself() -> None:
    method = fst(warmup=0.15, decay=2e-3)
    assert resolve_method(method) is method
    assert resolve_method({"preset": "fst", "warmup": 0.15, "decay": 2e-3}) == method
    plain = {
        "name": "fst", "refresh_every": 40, "decay": 2e-3,
        "schedule": {
            "phases": [{"kind": "dense", "length": 0.15}, {"kind": "sparse"}, {"kind": "dense", "length": 1 / 6}],
        },
    }  # fmt: skip
    assert resolve_method(plain) == method
    assert resolve_method("asp_one_shot") == asp_one_shot()
    changed = replace(asp_one_shot(prune_at=4), frozen_in_place=False, name="mine")
    assert (
        resolve_method({"preset": "asp_one_shot", "prune_at": 4, "frozen_in_place": False, "name": "mine"}) == changed
    )
    for schedule in (3, {"phase": []}, "sparse"):
        with pytest.raises(TypeError, match="it must be a Schedule, or a list of phases"):
            resolve_method({"schedule": schedule})
    with pytest.raises(TypeError, match="method is 3"):
        resolve_method(3)  # type: ignore[arg-type]


def test_descriptions_are_plain_and_tell_methods_apart() -> None:
    assert fst().describe() == Method(**{**fst().__dict__, "criterion": Magnitude()}).describe()
    assert fst().describe() != fst(decay=1e-4).describe()
    assert asp_one_shot().describe()["schedule"] == [
        {"kind": "dense", "length": 0.5, "share": 1.0, "earliest": None, "kept": 2},
        {"kind": "frozen", "length": None, "share": 1.0, "earliest": None, "kept": 2},
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works_with_its_defaults(preset: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    training = SparseTraining(model, optimizer, preset, total_steps=6, verbose=False)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        assert training.metrics()["violations"] == 0
    training.finish()
    assert [type(layer).__name__ for layer in model] == ["Linear", "Tanh", "Linear"]
