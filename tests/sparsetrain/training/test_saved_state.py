import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from models import mlp, train
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.training.timing import Part


class Watch:
    """Notes every part of a step, and a model's weights as they are when it begins."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts: list[Part] = []
        self.weights: list[dict[str, Tensor]] = []

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        self.weights.append({key: value.clone() for key, value in self.model.state_dict().items()})
        yield
        self.parts.append(name)


def running(method: str | dict[str, object], steps: int) -> tuple[nn.Module, st.SparseTraining]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = st.SparseTraining(model, optimizer, method, 12, verbose=False)
    train(model, optimizer, steps)
    return model, training


def test_a_timer_sees_the_search_and_the_packing_of_every_step() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = {"preset": "fst", "warmup": 2, "dense_tail": 2, "refresh_every": 3}
    training = st.SparseTraining(model, optimizer, method, 12, watch_dense=False, verbose=False)
    assert training.timer is None
    parts = []
    for step in range(12):
        training.timer = watch = Watch(model)
        train(model, optimizer, 1, start=step)
        parts.append(watch.parts)
    searched = [step + 1 for step, names in enumerate(parts) if names == ["refresh", "repack"]]
    assert searched == [2, 5, 8]  # where the sparse phase begins, and every third step of it
    assert all(names == ["repack"] for step, names in enumerate(parts) if step + 1 not in searched)
    training.timer = None
    training.refresh()


def test_parts_that_fail_leave_the_timer() -> None:
    _, training = running("fst", 3)
    left = []

    class Timer:
        @contextmanager
        def part(self, name: Part) -> Iterator[None]:
            try:
                yield
            finally:
                left.append(name)

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("no masks")

    training.timer = Timer()
    training.masks.refresh = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no masks"):
        training.refresh()
    assert left == ["refresh"]


@pytest.mark.parametrize("method", ["sr_ste", "s_ste", "slope", "asp_one_shot"])
def test_pruned_entries_are_back_before_weights_are_packed(method: str) -> None:
    model, training = running(method, 8)
    masters = copy.deepcopy(model.state_dict())
    saved = dict(model.state_dict())
    pruned = st.detach_pruned(saved, training.masks.layers)
    assert pruned
    again = mlp(seed=1)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    resumed = st.SparseTraining(again, optimizer, method, 12, verbose=False)
    again.load_state_dict(saved)
    resumed.timer = watch = Watch(again)
    resumed.load_state_dict({**training.state_dict(), "pruned_weights": pruned})
    assert watch.parts == ["repack"]
    for name, weight in masters.items():
        assert torch.equal(watch.weights[0][name], weight), name
        assert torch.equal(again.state_dict()[name], weight), name


def test_masks_that_a_new_length_has_searched_at_once_see_pruned_entries() -> None:
    """A run that goes on in a shorter one enters its next phase as it loads, and searches masks there."""
    method = {
        "preset": "iterative",
        "count": None,
        "by": "density",
        "start": 0.25,
        "every": 0.5,
        "frozen_in_place": False,
    }
    model, training = running(method, 6)  # 3:4 since step 3, 2:4 from step 9
    assert training.masks.kept == 3
    saved = dict(model.state_dict())
    pruned = st.detach_pruned(saved, training.masks.layers)
    masks = []
    for weights, more in ((copy.deepcopy(model.state_dict()), {}), (saved, {"pruned_weights": pruned})):
        again = mlp(seed=1)
        again.load_state_dict(weights)
        optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
        with pytest.warns(UserWarning, match="another total_steps"):
            resumed = st.SparseTraining(
                again, optimizer, method, 8, state={**training.state_dict(), **more}, verbose=False
            )
        assert resumed.masks.kept == 2
        masks.append(resumed.masks.codes)
    for name in masks[0]:
        assert torch.equal(masks[0][name], masks[1][name]), name


@pytest.mark.filterwarnings("always")
def test_warnings_point_at_the_line_that_resumes() -> None:
    _, training = running("fst", 3)
    state = training.state_dict()
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="another total_steps") as warned:
        resumed = st.SparseTraining(model, optimizer, "fst", 24, state=state, verbose=False)
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="another total_steps") as warned:
        resumed.load_state_dict(state)
    assert warned[0].filename == __file__


@pytest.mark.filterwarnings("always")
def test_warnings_point_at_the_line_that_starts() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([entry for entry in model.parameters() if entry.requires_grad], lr=1e-2)
    with pytest.warns(UserWarning, match="requires_grad=False") as warned:
        st.SparseTraining(model, optimizer, "sr_ste", 12, verbose=False)
    assert warned[0].filename == __file__
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = {"preset": "fst", "decay": "auto", "warmup": 0.5}
    with pytest.warns(UserWarning, match="too few to adjust it") as warned:
        st.SparseTraining(model, optimizer, method, 12, verbose=False)
    assert warned[0].filename == __file__
