"""Arguments of a wrong kind or value are refused when they are given, by every constructor."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import mlp
from torch import nn

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods.presets import PRESETS

WRONG: dict[str, list[Any]] = {
    "method": [3, None, "fts", ["fst"], st.Method, {"preset": None}, {"preset": ["fst"]}],
    "targets": [5, None, [], [1], b"mlp", True],
    "exclude": [5, None, [None], 0.5],
    "backend": ["cusparslt", None, 1, [], "Masked"],
    "deterministic": ["yes", None, 1, 0],
    "keep_transposed": ["yes", None, 1],
    "total_steps": [0, -3, 2.0, float("nan"), True, "12", [12]],
    "watch_dense": ["no", None, 0],
    "track_age": ["no", None, 1],
    "gather": ["zipped", None, 1, [], "Packed"],
    "group": ["world", 5, [0, 1], dist.ProcessGroup],
    "per_layer_metrics": ["x", None],
    "print_table": ["x", 1],
    "logits_from": [5, None, ["net"]],
    "teacher": ["x", 5, mlp],
    "verbose": ["x", None],
    "lr_schedulers": [5, None, [3], "cosine"],
    "state": [5, [], "state", ()],
    "model": [None, 5, "gpt2", nn.Linear],
    "optimizer": [None, 5, "adam", torch.optim.SGD, [None], []],
    "pattern": ["transposible", None, ["row_wise"], 2],
    "criterion": ["magnitud", None, ["magnitude"], st.Magnitude],
    "gradient": ["step", None, ["ste"], 1.0],
    "phase": ["spars", None, ["sparse"]],
    "weight_product": ["mvu", None, ["mvue"]],
    "frozen_gradient": ["step", None],
    "name": [None, 5],
    "schedule": [None, "fst", 5, [st.Phase("sparse")]],
    "refresh_every": [0, -1, 2.0, True, "4", None, [1]],
    "decay": ["a", None, -1, float("nan"), float("inf"), True, [1], 10**400],
    "decay_on": ["gradients", None, []],
    "decay_ramp": ["x", None, -1, 1.5, True],
    "hysteresis": ["x", None, -1, float("inf"), True],
    "forward": ["sof", None, []],
    "dense_budget": ["x", None, 1, -0.1, float("nan"), True],
    "dense_unit": ["layer", None, []],
    "frozen_in_place": ["yes", None, 1],
    "adapter_rank": ["x", None, -1, 2.0, True],
    "adapter_start": ["x", None, -1, 1.5],
    "adapter_merge": ["yes", None, 1],
    "clear_moments": ["yes", None, 1],
    "decay_in_head": ["yes", None, 1],
    "lr_factor": ["x", None, 0, -1, float("inf"), True],
    "restart_lr": ["yes", None, 0],
    "distillation": ["x", None, -1, 2, float("nan"), True],
    "distillation_temperature": ["x", None, 0, float("inf")],
    "temperature": ["x", None, 0],
    "freeze_second_moments": ["yes", None, 1],
    "refit": [None, 1, "least_squares"],
    "if_pretrained": [None, "wanda", {"pattern": "row_wise"}, {"criterion": st.Magnitude()}, {3: 4}],
    "mvue": ["yes", None, 1],
    "warmup": ["x", None, -1, 1.5],
    "dense_tail": ["x", None, -1, 1.5],
    "freeze": ["x", None, -1, 1.5],
    "freeze_at": ["x", None, -1, 1.5],
    "prune_at": ["x", None, -1, 1.5],
    "start": ["x", None, -1, 1.5],
    "every": ["x", None, -1, 1.5],
    "latest": ["x", None, -1, 1.5],
    "earliest": ["x", -1, 1.5],
    "count": ["x", 0, 2.0, True],
    "by": ["layer", None, []],
}
"""By the argument's name."""


def run(**changes: Any) -> Any:
    model = mlp()
    arguments = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "method": "fst", "total_steps": 8}
    return st.SparseTraining(**{**arguments, "verbose": False, **changes})


def layers(**changes: Any) -> Any:
    return st.sparsify_(**{"model": mlp(), "verbose": False, **changes})


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "SparseTraining": (run, st.SparseTraining.__init__),
    "SparseTrainingCallback": (SparseTrainingCallback, SparseTrainingCallback.__init__),
    "sparsify_": (layers, st.sparsify_),
    "select_layers": (lambda **changes: st.select_layers(**{"model": mlp(), **changes}), st.select_layers),
    "Method": (st.Method, st.Method.__init__),
    **{name: (preset, preset) for name, preset in PRESETS.items()},
}


@pytest.mark.parametrize("owner", CALLS)
def test_every_argument_is_checked_when_it_is_given(owner: str) -> None:
    call, signature = CALLS[owner]
    names = [name for name in inspect.signature(signature).parameters if name != "self"]
    assert set(names) <= set(WRONG), "a new argument needs wrong values above"
    call()
    for name in names:
        for value in WRONG[name]:
            if (owner, name) == ("select_layers", "pattern"):
                continue  # a word for the report
            with pytest.raises((TypeError, ValueError)) as caught:
                call(**{name: value})
            message = str(caught.value)
            assert re.fullmatch(r"[^\n]*\.", message), message
            known = {"temperature": "distillation_temperature", "mvue": "mvue", "earliest": "earliest"}.get(name, name)
            assert known in message or "phase" in message, (owner, name, value, message)
            assert len(message) < 400, message


@pytest.mark.parametrize(
    ("argument", "value", "word"),
    [
        ("backend", "cusparslt", "cusparselt"),
        ("method", {"preset": "fst", "pattern": "transposible"}, "transposable"),
        ("method", {"preset": "fst", "criterion": "magnitud"}, "magnitude"),
        ("method", {"preset": "fst", "decay_on": "gradients"}, "gradient"),
    ],
)
def test_the_nearest_right_word_is_named(argument: str, value: Any, word: str) -> None:
    for call in (SparseTrainingCallback, run):
        with pytest.raises(ValueError, match=rf"\(did you mean '{word}'\?\)\.$"):
            call(**{argument: value})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: st.Phase("spars"), "phase kind is 'spars': it must be one of ['dense', 'sparse', 'frozen'] (did you"),
        (lambda: st.Phase(["sparse"]), "phase kind is ['sparse']: "),
        (lambda: st.Phase("sparse", share="all"), "share is 'all': it must be more than 0 and at most 1."),
        (lambda: st.Phase("sparse", kept=2.0), "kept is 2.0: it must be 2 or 3"),
        (lambda: st.Phase("sparse", kept=True), "kept is True: "),
        (lambda: st.Schedule(5), "phases is 5: it must be a list of "),
        (lambda: st.Schedule(("dense",)), "phases[0] is 'dense': it must be a Phase."),
        (lambda: st.from_scratch().resolve(True), "total_steps is True: it must be a positive int"),
        (lambda: st.scaled("a", 1), "kept is 'a': it must be a finite number."),
        (lambda: st.GradientRule(1.0, float("nan")), "pruned is nan: "),
        (lambda: st.Wanda(beta="x"), "beta is 'x': it must be at least 0 and below 1."),
        (lambda: st.Fisher(beta=1.0), "beta is 1.0: "),
        (lambda: st.Random(seed="x"), "seed is 'x': it must be an int."),
    ],
)
def test_parts_of_a_method_name_what_is_allowed(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


def test_refusals_leave_the_model_as_it_was() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters())
    for name in ("total_steps", "deterministic", "lr_schedulers", "teacher", "state"):
        with pytest.raises(ValueError, match=name):
            run(model=model, optimizer=optimizer, **{name: WRONG[name][0]})
        assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
        assert not optimizer._optimizer_step_pre_hooks


def test_the_twin_for_hugging_face_checks_the_same_arguments() -> None:
    pytest.importorskip("transformers")
    from sparsetrain.callbacks import HuggingFaceSparseTraining

    for name in inspect.signature(HuggingFaceSparseTraining).parameters:
        for value in WRONG[name]:
            with pytest.raises((TypeError, ValueError), match=name):
                HuggingFaceSparseTraining(**{name: value})
