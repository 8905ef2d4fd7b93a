"""Runs of one to three steps, as ``fast_dev_run`` makes them: phases round to nothing, and every method still runs."""

import logging
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning_runs import Regression, batches
from torch import nn

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.methods import PRESETS

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "automatic decay": ({"preset": "fst", "decay": "auto", "warmup": 0.15}, "steps are too few to adjust it"),
    "observing one-shot": ({"preset": "asp_one_shot", "criterion": "wanda"}, "has no statistics of 2 of 2 layers"),
    "observing step": ({"preset": "step", "criterion": "fisher"}, "has no statistics of 2 of 2 layers"),
    "nearly half and half": ({"preset": "fst", "warmup": 0.49, "dense_tail": 0.49}, ""),
    "halves that freeze": ({"preset": "recommended", "warmup": 0.5, "freeze": 0.5}, ""),
    "moments that freeze late": (
        {"schedule": [{"kind": "dense", "length": 0.1}, {"kind": "frozen"}], "freeze_second_moments": True}, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("length", [True, 2, 3])
@pytest.mark.parametrize("name", [*PRESETS, *OTHERS])
def test_every_method_survives_a_short_run(name: str, length: int) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    method, expected = OTHERS.get(name, ({"preset": name}, ""))
    module, callback = Regression(), SparseTrainingCallback(method, targets=["net.*"])
    trainer = Trainer(accelerator="cpu", fast_dev_run=length, callbacks=[callback], enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, batches(), batches())
    mine = [
        str(entry.message) for entry in caught if "criterion" in str(entry.message) or "decay" in str(entry.message)
    ]
    assert all(expected and expected in message for message in mine)
    assert bool(mine) == bool(expected) or (length != 1 and not mine)
    assert callback.training is not None
    assert callback.training.clock == trainer.global_step == int(length)
    assert callback.training.finished
    assert type(module.net[0]) is nn.Linear
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    zeros = {float((module.net[place].weight == 0).float().mean()) for place in (0, 2)}
    ends_dense = callback.training.phase == "dense"
    assert zeros <= ({0.0} if ends_dense else {0.0, 0.5})
    assert 0.5 in zeros or ends_dense


def test_without_a_dense_head_second_moments_are_still_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    for method in ({"preset": "step", "latest": 0, "earliest": None}, {"preset": "step", "latest": 0.0, "earliest": 0}):
        with pytest.raises(
            ValueError, match=r"^freeze_second_moments is True but the first phase is sparse: begin with"
        ):
            st.SparseTraining(model, torch.optim.AdamW(model.parameters()), method, 40, verbose=False)
