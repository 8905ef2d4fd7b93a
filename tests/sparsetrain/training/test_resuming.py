"""A resumed run equals the uninterrupted one, and a state of another run is refused."""

import copy
import warnings

import pytest
import torch
from models import adamw, mlp, sparse_run, train

import sparsetrain as st
from sparsetrain.methods import asp_one_shot, fst


@pytest.mark.parametrize("stop", [1, 5, 7, 10])
@pytest.mark.parametrize(
    "method",
    [
        fst(refresh_every=4, decay=0.01, warmup=2, dense_tail=3),
        asp_one_shot(prune_at=6),
        fst(criterion="random", refresh_every=3),
    ],
    ids=["fst", "asp", "random"],
)
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(method: st.Method, stop: int) -> None:
    model, optimizer, training = sparse_run(method, 14, track_age=True)
    train(model, optimizer, stop, clip=0.1)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    train(model, optimizer, 14 - stop, start=stop, clip=0.1)
    for through_constructor in (True, False):
        other = mlp(seed=1)
        other.load_state_dict(saved[0])
        other_optimizer = adamw(other)
        other_optimizer.load_state_dict(copy.deepcopy(saved[1]))
        state = saved[2] if through_constructor else None
        resumed = st.SparseTraining(other, other_optimizer, method, 14, track_age=True, state=state, verbose=False)
        if not through_constructor:
            other.load_state_dict(saved[0])
            resumed.load_state_dict(saved[2])
        train(other, other_optimizer, 14 - stop, start=stop, clip=0.1)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
        ours, theirs = training.metrics(), resumed.metrics()
        assert {k: v for k, v in ours.items() if not k.endswith("_ms")} == {
            k: v for k, v in theirs.items() if not k.endswith("_ms")
        }
        assert all(torch.equal(c, resumed.masks.codes[name]) for name, c in training.masks.codes.items())


def test_the_state_survives_a_weights_only_load(tmp_path) -> None:
    _, _, training = sparse_run(asp_one_shot(prune_at=0), 4, track_age=True)
    torch.save(training.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["clock"] == 0


def test_loading_a_foreign_state_into_a_running_engine_changes_nothing() -> None:
    model, optimizer, training = sparse_run(fst(refresh_every=2), 12)
    train(model, optimizer, 3)
    before = training.state_dict()
    other = st.SparseTraining(small := mlp(width=16, hidden=8), adamw(small), "fst", 12, verbose=False)
    with pytest.raises(ValueError, match="'0'"):
        training.load_state_dict(other.state_dict())
    after = training.state_dict()
    assert all(torch.equal(before["codes"][name], after["codes"][name]) for name in before["codes"])
    assert training.clock == 3


def test_resuming_with_another_method_warns() -> None:
    state = sparse_run(fst(decay=0.1), 12)[2].state_dict()
    model = mlp()
    with pytest.warns(UserWarning, match=r"^resuming with another method: decay is 0\.2 instead of 0\.1\.$"):
        st.SparseTraining(model, adamw(model), fst(decay=0.2), 12, state=state, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = mlp()
        st.SparseTraining(model, adamw(model), fst(decay=0.1), 12, state=state, verbose=False)


def test_a_state_of_another_density_is_refused() -> None:
    method = {"preset": "iterative", "by": "density", "start": 2, "every": 6}
    model, optimizer, training = sparse_run(method)
    train(model, optimizer, 4)
    _, _, other = sparse_run({**method, "every": 1})
    with pytest.raises(ValueError, match="keep 3 of four but the schedule says 2 at step 4: resume with the same"):
        other.load_state_dict(training.state_dict())
