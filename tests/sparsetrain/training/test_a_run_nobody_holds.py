"""A run lives as long as its hooks on the optimizer do, and goes with them."""

import gc
import weakref

import pytest
import torch
from models import mlp, train
from torch import nn

import sparsetrain as st
from sparsetrain.layers.claims import take_over


def started() -> tuple[nn.Module, torch.optim.Optimizer, "weakref.ref[st.SparseTraining]"]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = weakref.ref(st.SparseTraining(model, optimizer, "sr_ste", 12, verbose=False))
    gc.collect()
    return model, optimizer, run


def test_it_trains_on_and_a_second_run_is_told_of_it() -> None:
    model, optimizer, run = started()
    train(model, optimizer, 3)
    found = run()
    assert found is not None
    assert found.clock == 3
    with pytest.raises(ValueError, match="already sparse: another SparseTraining trains it"):
        st.SparseTraining(model, optimizer, "sr_ste", 12, targets=["0"], verbose=False)


def test_a_trainer_takes_its_layers_over_and_its_hooks_off() -> None:
    model, optimizer, _ = started()
    train(model, optimizer, 3)
    assert take_over(model) == [3]
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    train(model, optimizer, 2)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_finished_run_goes_with_the_last_name_of_it() -> None:
    model, _, run = started()
    found = run()
    assert found is not None
    found.finish()
    del found
    gc.collect()
    assert run() is None
    assert type(model[0]) is nn.Linear
