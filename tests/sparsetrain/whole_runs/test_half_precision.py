"""Models whose weights are bfloat16 or float16: every method trains them, and a small decay is not lost in rounding."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import ResumableBatches
from models import mlp, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback

STEPS = 12
SPARSE = st.Schedule((st.Phase("sparse"),))
RUNS: dict[str, dict[str, Any]] = {
    "fst": {"refresh_every": 3, "dense_tail": 2, "decay": 1e-3},
    "fst, automatic": {"refresh_every": 2, "warmup": 4, "dense_tail": 0, "decay": "auto", "hysteresis": 0.05},
    "recommended": {"warmup": 2, "refresh_every": 2, "freeze": 4},
    "sr_ste": {"decay": 1e-3},
    "sr_ste, SGD": {"decay": 1e-3, "pattern": "transposable"},
    "step": {"latest": 6, "earliest": 2, "decay": 1e-3},
    "dense_to_sparse_finetune": {"decay": 1e-3, "freeze_at": 9, "refresh_every": 2},
    "s_ste": {},
    "slope": {"refresh_every": 3, "adapter_start": 6, "adapter_rank": 2},
}


def start(name: str, model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, st.SparseTraining]:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # squares of gradients vanish in float16, and so does the usual ε
    optimizer = sgd if "SGD" in name else torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    method = {"preset": name.partition(",")[0], **RUNS[name]}
    return optimizer, st.SparseTraining(model, optimizer, method, STEPS, verbose=False, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_every_method_trains_and_resumes_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer, training = start(name, model)
    saved: Any = None
    for step in range(STEPS):
        if step == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
        train(model, optimizer, 1, start=step)
        assert training.metrics()["violations"] == 0
    assert all(value.dtype == dtype and value.isfinite().all() for value in model.state_dict().values())
    other = mlp(seed=1).to(dtype)
    other.load_state_dict(saved[0])
    torch.manual_seed(5)  # nothing depends on it
    other_optimizer, _ = start(name, other, state=saved[2])
    other_optimizer.load_state_dict(saved[1])
    train(other, other_optimizer, STEPS - 5, start=5)
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(8, 16).to(dtype)
    expected = model(x)
    training.finish()
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)  # adapters are merged in 16 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_decay_of_gradients_below_half_a_gap_has_the_right_mean(dtype: torch.dtype) -> None:
    """The bound is 5·(gap/2)/√n for the mean of n sums, each of which is rounded by less than a gap."""
    gap = torch.finfo(dtype).eps
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(dtype)
    for layer in model:
        layer.weight.data.copy_(0.5 * torch.rand(64, 64) + 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = st.Method(decay=0.2 * gap, refresh_every=1000, pattern="row_wise", schedule=SPARSE)
    training = st.SparseTraining(model, optimizer, method, 40, verbose=False)
    weight, pruned = model[0].weight.detach(), ~model[0].mask
    pull = 0.2 * gap * weight.double()
    nearest = (1 + (0.2 * gap) * weight.float()).to(dtype)
    assert (nearest == 1).all()  # would lose it all
    added: list[Tensor] = []
    before = torch.get_rng_state()
    for _ in range(40):
        for layer in model:
            layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        added.append(model[0].weight.grad.double() - 1)
        assert not torch.equal(model[0].weight.grad[pruned], model[1].weight.grad[pruned])  # each layer has its own
    assert torch.equal(torch.get_rng_state(), before)
    found = torch.stack(added)
    assert not found[:, ~pruned].any()
    off = (found.mean(0) - pull)[pruned].mean()
    assert off.abs() < 5 * gap / 2 / math.sqrt(40 * int(pruned.sum()))
    assert not torch.equal(added[0], added[1])  # each step as well
    training.finish(zeros=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_decay_of_weights_below_half_a_gap_has_the_right_mean(dtype: torch.dtype) -> None:
    """A weight near 1 in magnitude takes 100 steps of a twentieth of a gap each."""
    gap = torch.finfo(dtype).eps / 2  # below 1
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    signs = torch.randn(64, 64).sign()
    model[0].weight.data.copy_(signs * (1 - 10 * gap * torch.arange(64 * 64).view(64, 64).fmod(2)))
    start_weight = model[0].weight.detach().double().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = st.Method(decay=0.5 * gap, decay_on="weight", refresh_every=1000, pattern="row_wise", schedule=SPARSE)
    st.SparseTraining(model, optimizer, method, 100, verbose=False)
    pruned = ~model[0].mask
    assert torch.equal((start_weight * (1 - 0.05 * gap)).to(dtype).double(), start_weight)  # would lose it all
    for _ in range(100):
        model[0].weight.grad = torch.zeros_like(model[0].weight)
        optimizer.step()
    moved = (start_weight - model[0].weight.detach().double()) * signs
    assert not moved[~pruned].any()
    expected = (start_weight.abs() * (1 - (1 - 0.05 * gap) ** 100))[pruned]
    off = (moved[pruned] - expected).mean().abs()
    assert off < 5 * (gap / 2) * math.sqrt(100 / int(pruned.sum()))
    assert moved[pruned].mean() > 3 * gap


def test_ranks_draw_alike_and_other_steps_otherwise() -> None:
    """A rank has its own generator; gradients are the same on all, and so must be the sums."""
    found = []
    for rank in range(2):
        torch.manual_seed(100 + rank)
        model = mlp().to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        st.SparseTraining(model, optimizer, st.Method(decay=1e-3, schedule=SPARSE), 4, verbose=False)
        torch.manual_seed(100 + rank)
        model[0].weight.grad = torch.ones_like(model[0].weight)
        optimizer.step()
        found.append(model[0].weight.grad.clone())
    assert torch.equal(found[0], found[1])
    assert (found[0] != 1).any()


def test_a_small_hysteresis_keeps_what_is_kept() -> None:
    """All entries are equal, so any bonus decides; a thousandth of 1 is less than half a gap of bfloat16."""
    model = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    model[0].weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = st.Method(hysteresis=1e-3, pattern="row_wise", schedule=SPARSE)
    training = st.SparseTraining(model, optimizer, method, 4, verbose=False)
    other = ~model[0].mask
    model[0].set_codes_(st.encode_tiles(other))
    training.refresh()
    assert torch.equal(model[0].mask, other)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)).bfloat16()


LLAMA: dict[str, dict[str, Any]] = {
    "asp_one_shot": {"prune_at": 4},
    "recommended": {"warmup": 2, "refresh_every": 4},
    "recommended, frozen": {"warmup": 2, "refresh_every": 4, "freeze": 8},
    "s_ste": {},
    "slope": {"adapter_start": 10, "adapter_rank": 2, "refresh_every": 4},
    "sr_ste": {},
}


@pytest.mark.parametrize("name", LLAMA)
def test_a_llama_in_bfloat16_learns(name: str) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    method = {"preset": name.partition(",")[0], **LLAMA[name]}
    training = st.SparseTraining(model, optimizer, method, 25, verbose=False)
    assert len(training.report.sparse) == 7
    losses = []
    for step in range(25):
        first = torch.randint(32, (8, 1), generator=torch.Generator().manual_seed(step))
        tokens = (first + torch.arange(12)) % 32  # counts
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    assert training.metrics()["violations"] == 0
    training.finish()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    zeros = float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
    assert zeros == 0 if name == "slope" else zeros >= 0.5


class Counting(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, name: str, checkpoint: Path | None = None) -> Counting:
    module = Counting()
    arguments = {"recommended": {"warmup": 2, "refresh_every": 2, "freeze": 4}, "sr_ste": {}}[name]
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = Trainer(
        max_steps=10, precision="bf16-true", accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SparseTrainingCallback(method={"preset": name, **arguments}), saving],
    )  # fmt: skip
    tokens = (torch.randint(32, (80, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(12)) % 32
    trainer.fit(module, ResumableBatches(TensorDataset(tokens), 8), ckpt_path=checkpoint, weights_only=False)
    return module


@pytest.mark.parametrize("name", ["recommended", "sr_ste"])
def test_lightning_in_bf16_true_trains_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = fit(tmp_path, name)
    resumed = fit(tmp_path, name, tmp_path / "step=5.ckpt")
    for ours, theirs in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)
    weight = whole.model.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) >= 0.5
