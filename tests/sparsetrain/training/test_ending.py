"""What a run ends as, where a phase's boundary is the end of the run; zeros are counted here, by loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import convnet, mlp, sparse_run, train
from torch import nn

import sparsetrain as st
from sparsetrain.methods import (
    asp_one_shot,
    dense_to_sparse_finetune,
    fst,
    iterative,
    recommended,
    s_ste,
    slope,
    sr_ste,
    step,
)
from sparsetrain.methods.schedule import Phase, Schedule, dense_prune_retrain, from_scratch

Finished = tuple[nn.Sequential, st.SparseTraining]


def run(method: Any, steps: int, total: int | None = None, zeros: bool = True, **options: Any) -> Finished:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, method, total or steps, verbose=False, **options)
    train(model, optimizer, steps)
    training.finish(zeros=zeros)
    return model, training


def kept_of_four(model: nn.Sequential) -> list[int]:
    """The most entries of four neighbours in a row that are not zero, of each layer."""
    rows = [layer.weight.tolist() for layer in (model[0], model[2])]
    groups = [[row[left : left + 4] for row in matrix for left in range(0, len(row), 4)] for matrix in rows]
    return [max(sum(entry != 0 for entry in group) for group in matrix) for matrix in groups]


AT_THE_END = {
    "asp_one_shot": lambda: asp_one_shot(prune_at=1.0),
    "asp_one_shot, rounded up to the end": lambda: asp_one_shot(prune_at=0.99),
    "asp_one_shot, in steps": lambda: asp_one_shot(prune_at=12),
    "dense_to_sparse_finetune": lambda: dense_to_sparse_finetune(freeze_at=1.0),
    "iterative, one round": lambda: iterative(1, start=1.0),
    "iterative, the last round": lambda: iterative(start=0.5, every=0.25),
    "iterative, of densities": lambda: iterative(start=0.5, every=0.5, by="density"),
    "recommended": lambda: recommended(warmup=1.0),
    "recommended, frozen from the end": lambda: recommended(warmup=0.5, freeze=0.5),
    "sr_ste": lambda: sr_ste(warmup=1.0),
    "s_ste": lambda: s_ste(warmup=1.0),
    "step": lambda: step(latest=1.0, earliest=1.0),
    "slope": lambda: slope(adapter_start=1.0),
}


@pytest.mark.parametrize("name", AT_THE_END)
def test_a_phase_that_begins_at_the_end_comes_into_force_after_the_last_step(name: str) -> None:
    model, training = run(AT_THE_END[name](), 12)
    assert kept_of_four(model) == [2, 2]
    zeros = sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2]))
    assert str(training.ending) == f"ends 2:4: {100 * zeros / 1024:.1f} % zeros in 2 layers"
    assert training.ending is not None
    assert training.ending.as_planned


def test_the_last_step_before_a_pruning_at_the_end_is_a_dense_one() -> None:
    model, _ = run(asp_one_shot(prune_at=1.0), 12)
    dense = mlp()
    train(dense, torch.optim.AdamW(dense.parameters(), lr=1e-2), 12)
    for layer, reference in ((model[0], dense[0]), (model[2], dense[2])):
        mask = st.transposable_mask(reference.weight.detach().abs())
        assert torch.equal(layer.weight, reference.weight * mask)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fst(warmup=1.0), ["warmup is 1.0", "tail"]),
        (lambda: fst(dense_tail=1.0), ["tail 1.0", "no step to train sparse"]),
        (lambda: recommended(warmup=0.5, dense_tail=0.5), ["0.5", "no step to train sparse"]),
        (lambda: sr_ste(dense_tail=1.0), ["tail 1.0", "no step to train sparse"]),
        (lambda: s_ste(dense_tail=1.0), ["tail 1.0", "no step to train sparse"]),
        (lambda: iterative(start=1.0), ["1 + 0.2 + 0.2 of the run", "more than 1"]),
        (lambda: recommended(warmup=0.75, freeze=0.5), ["0.75 + 0.5 of the run", "more than 1"]),
    ],
)
def test_what_cannot_happen_is_refused_when_the_method_is_made(call: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"of the run|no step to train sparse") as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("total", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(
    "method",
    [asp_one_shot(), dense_to_sparse_finetune(), fst(), iterative(), iterative(start=0.5, every=0.25), recommended(),
     recommended(warmup=0.5, freeze=0.25, dense_tail=0.25), from_scratch(0.5, 0.4), s_ste(), sr_ste()],
    ids=lambda method: getattr(method, "name", "schedule"),
)  # fmt: skip
def test_short_runs_end_as_their_last_phase_says(method: Any, total: int) -> None:
    if isinstance(method, Schedule):
        method = st.Method(schedule=method)
    model, training = run(method, total)
    dense = method.schedule.phases[-1].kind == "dense"
    assert kept_of_four(model) == ([4, 4] if dense else [2, 2])
    assert training.ending is not None
    assert training.ending.as_planned
    assert str(training.ending).startswith("ends dense: its last phase is dense" if dense else "ends 2:4: ")


def test_rounded_phases_of_a_whole_run_fit_into_it() -> None:
    schedule = Schedule((Phase("dense", 0.5), Phase("sparse", 0.25), Phase("frozen", 0.25)))
    assert [schedule.resolve(total).starts[-1] <= total for total in range(1, 40)] == [True] * 39
    with pytest.raises(ValueError, match=r"take 16 steps but total_steps is 12"):
        from_scratch(8, 8).resolve(12)
    with pytest.raises(ValueError, match=r"take 14 steps but total_steps is 12"):
        from_scratch(8, 0.5).resolve(12)
    assert dense_prune_retrain(1.0).resolve(7).starts == (0, 7)


STOPPED = {
    "before masks freeze at step 26": (asp_one_shot(), 13, 52, [4, 4], "ends dense: "),
    "before masks come into force at step 10": (recommended(), 5, 52, [4, 4], "ends dense: "),
    "before its dense phase at step 43": (fst(), 13, 52, [2, 2], "ends 2:4: 50.0 % zeros in 2 layers; "),
    "before masks keep 2 of four at step 23": (
        iterative(by="density"), 15, 52, [3, 3], "ends 3:4: 25.0 % zeros in 2 layers; ",
    ),
    "before 67 % of the layers are pruned at step 23": (
        iterative(), 15, 52, None, "ends 2:4: 50.0 % zeros in 1 layer, 1 layer dense; ",
    ),
    "before its adapters begin at step 51": (
        slope(adapter_rank=2), 13, 52, [2, 2], "ends 2:4: 50.0 % zeros in 2 layers; ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", STOPPED)
def test_a_run_that_is_stopped_says_what_did_not_come(words: str) -> None:
    method, steps, total, kept, begins = STOPPED[words]
    model, training = run(method, steps, total)
    assert kept is None or kept_of_four(model) == kept
    assert str(training.ending) == f"{begins}the schedule stopped at step {steps} of {total}, {words}"
    assert training.ending is not None
    assert not training.ending.as_planned


def test_other_endings(capsys: pytest.CaptureFixture[str]) -> None:
    model, training = run(recommended(), 12, zeros=False)
    assert kept_of_four(model) == [4, 4]
    assert str(training.ending) == "ends dense: finish(zeros=False) keeps the dense masters"
    model, training = run({"preset": "recommended", "dense_budget": 0.5}, 12)
    assert sorted(kept_of_four(model)) == [2, 4]
    assert str(training.ending) == "ends 2:4: 50.0 % zeros in 1 layer, 1 layer dense"
    model, training = run({"preset": "recommended", "dense_budget": 0.5, "dense_unit": "tiles"}, 12)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2])) / 1024
    assert 0.2 < zeros < 0.3
    assert str(training.ending) == f"ends 2:4 but for its dense tiles: {100 * zeros:.1f} % zeros in 2 layers"
    model, training = run(slope(adapter_rank=2, adapter_start=3), 12)
    assert kept_of_four(model) == [4, 4]
    assert str(training.ending) == "ends dense: its adapters are merged into the weights, as the method says"
    assert capsys.readouterr().out == ""


def test_finish_prints_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    training = st.SparseTraining(model, torch.optim.SGD(model.parameters()), "sr_ste")
    assert training.ending is None
    training.finish()
    assert capsys.readouterr().out.splitlines()[1:] == ["ends 2:4: 50.0 % zeros in 2 layers"]


@pytest.mark.filterwarnings("ignore:weights of sparse layers have requires_grad=False")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Muon, torch.optim.Adagrad, torch.optim.Rprop])
@pytest.mark.parametrize("total", [1, 12])
def test_the_default_works_with_any_optimizer_and_ends_two_of_four(optimizer: Any, total: int) -> None:
    model = mlp(bias=False)
    model[2].weight.requires_grad_(False)
    stepper = optimizer([model[0].weight], lr=1e-3)
    training = st.SparseTraining(model, stepper, total_steps=total, verbose=False)
    train(model, stepper, total)
    training.finish()
    assert training.method == recommended(start="scratch")
    assert kept_of_four(model) == [2, 2]


def test_the_default_on_a_network_of_convolutions_says_what_to_pass() -> None:
    model = convnet()
    with pytest.raises(ValueError, match=r"'all-linear' matches no layer; allowed are .*'all-conv'"):
        st.SparseTraining(model, torch.optim.SGD(model.parameters()), total_steps=12)


def test_retiming_moves_what_has_not_begun() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, recommended(0.25, freeze=0.25, dense_tail=0.25), 40, verbose=False)
    assert training.timeline.starts == (0, 10, 20, 30)
    training.retime(20)
    assert training.timeline.starts == (0, 5, 10, 15)
    train(model, optimizer, 6)
    training.retime(40)
    assert training.timeline.starts == (0, 5, 20, 30)
    training.retime(None)
    train(model, optimizer, 30, start=6)
    assert (training.clock, training.phase) == (36, "sparse")
    with pytest.raises(ValueError, match="total_steps is 35 but 36 steps are taken"):
        training.retime(35)
    training.retime(36)
    assert (training.phase, training.timeline.starts) == ("dense", (0, 5, 36, 36))


def test_a_state_goes_on_with_its_own_phases_and_with_the_length_it_is_given() -> None:
    def start(total: int, **options: Any) -> st.SparseTraining:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        method = recommended(0.25, freeze=0.25, dense_tail=0.25)
        return st.SparseTraining(model, optimizer, method, total, verbose=False, **options)

    first = start(40)
    train(first.model, first._phases.run.optimizers[0], 12)
    first.retime(60)
    state = first.state_dict()
    assert start(60, state=state).timeline.starts == (0, 10, 30, 45)
    with pytest.warns(UserWarning, match="another total_steps: 80 instead of 60"):
        assert start(80, state=state).timeline.starts == (0, 10, 40, 60)
    with pytest.warns(UserWarning, match="another total_steps: 8 instead of 60"):
        assert start(8, state=state).phase == "dense"
    for starts in ([0, 10, 30], [0, 30, 10, 45], [1, 10, 30, 45], "0123", [0, 10, 30, 45.0], None):
        with pytest.raises(ValueError, match=r"starts.* the checkpoint is damaged"):
            start(60, state={**state, "starts": starts})


def test_finish_gives_the_function_of_the_last_step_and_can_be_called_twice() -> None:
    model, optimizer, training = sparse_run(fst(dense_tail=0, refresh_every=2))
    train(model, optimizer, 5)
    x = torch.randn(3, 16)
    expected = model(x)
    metrics, state = training.metrics(), training.state_dict()
    training.finish()
    training.finish()
    assert training.metrics() == metrics
    assert training.state_dict()["clock"] == state["clock"]
    torch.testing.assert_close(model(x), expected)
    assert all(type(layer) is nn.Linear for layer in (model[0], model[2]))
    train(model, optimizer, 1)
    assert training.clock == 5  # no hooks are left
    again = st.SparseTraining(model, optimizer, "fst", 4, verbose=False)
    train(model, optimizer, 4)
    assert again.clock == 4
