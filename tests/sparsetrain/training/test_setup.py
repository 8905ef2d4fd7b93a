"""What a run refuses or leaves alone at its start."""

import copy
from typing import Any

import pytest
import torch
from models import adamw, mlp, sparse_run, train
from torch import nn

import sparsetrain as st
from sparsetrain.methods import asp_one_shot, fst


def test_weights_without_gradients_may_be_sparse() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.warns(UserWarning, match="requires_grad=False: '0'"):
        training = st.SparseTraining(model, optimizer, asp_one_shot(prune_at=0), 2, verbose=False)
    train(model, optimizer, 2)
    training.finish()
    assert (model[0].weight == 0).float().mean() == 0.5


def test_bad_input_is_one_sentence_and_leaves_model_and_optimizer_alone() -> None:
    foreign = sparse_run(total=12)[2].state_dict()
    renamed = {**foreign, "codes": {"other": foreign["codes"]["0"], "2": foreign["codes"]["2"]}}
    damaged = {**foreign, "codes": {name: codes.clone() for name, codes in foreign["codes"].items()}}
    damaged["codes"]["0"][0, 0] = 7
    smaller = {**foreign, "codes": {name: codes[:1] for name, codes in foreign["codes"].items()}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "fts"}, "'fts'"),
        ({"targets": "nowhere"}, "'nowhere'"),
        ({"total_steps": None}, "total_steps is None"),
        ({"state": renamed}, "'other'"),
        ({"state": damaged}, "damaged"),
        ({"state": smaller}, "'0'"),
        ({"state": {"clock": 3}}, "state_dict"),
        ({"state": {**foreign, "pattern": "row_wise"}}, "row_wise"),
        ({"state": {**foreign, "version": 99}}, "99"),
        ({"state": {**foreign, "clock": -3}}, "-3"),
    ]
    for arguments, word in cases:
        model = mlp()
        optimizer = adamw(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
            st.SparseTraining(model, optimizer, **{"method": "fst", "total_steps": 12, "verbose": False, **arguments})
        assert word in str(caught.value), caught.value
        assert "\n" not in str(caught.value)
        assert all(type(layer) is not st.SparseLinear for layer in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_missing_owners_are_named() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="layer '2' has a trainable weight that no optimizer owns"):
        st.SparseTraining(model, torch.optim.SGD(model[0].parameters()), fst(decay=0.0), 12)
    second = mlp()
    st.sparsify_(second, verbose=False)
    with pytest.raises(ValueError, match="already sparse"):
        st.SparseTraining(second, adamw(second), "fst", 12)


def test_layers_that_were_sparse_before_are_left_to_whoever_made_them_so() -> None:
    model = mlp()
    st.sparsify_(model, ["0"], verbose=False)
    training = st.SparseTraining(model, adamw(model), fst(dense_tail=0), 4, targets=["2"], verbose=False)
    assert list(training.masks.layers) == ["2"]
    training.finish()
    assert isinstance(model[0], st.SparseLinear)
    assert type(model[2]) is nn.Linear


def test_the_engine_refuses_models_wrapped_in_fsdp() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        pass

    model = FullyShardedDataParallel(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="FSDP"):
        st.SparseTraining(model, adamw(model), "fst", 4)


def test_a_criterion_that_fails_leaves_the_model_as_it_was() -> None:
    class Broken(st.Criterion):
        needs = frozenset({"input"})

        def scores(self, weight: torch.Tensor, *, layer: str, clock: int) -> torch.Tensor:
            return weight.abs()

        def summarize_input(self, input: torch.Tensor) -> torch.Tensor:
            raise ValueError("no summary")

    model = mlp()
    optimizer = adamw(model)
    for method in ({"preset": "fst", "criterion": Broken()}, {"preset": "slope", "criterion": Broken()}):
        with pytest.raises(ValueError, match="no summary"):
            st.SparseTraining(model, optimizer, method, 6, verbose=False)
        assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
        assert not model[0]._forward_hooks
        assert not optimizer._optimizer_step_pre_hooks
        assert len(optimizer.param_groups[0]["params"]) == 4
