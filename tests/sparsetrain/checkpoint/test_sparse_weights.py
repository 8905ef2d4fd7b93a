import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from models import convnet, mlp, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain as st
from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.checkpoint.sparse_weights import evaluated_in_state_dicts

SLOPE = {"preset": "slope", "adapter_start": 3, "adapter_rank": 2}


def sparse(model: nn.Module, method: Any = "fst", steps: int = 4, total: int = 24) -> st.SparseTraining:
    training = st.SparseTraining(model, torch.optim.AdamW(model.parameters(), lr=1e-2), method, total, verbose=False)
    if steps:
        train(model, training._phases.run.optimizers[0], steps)
    return training


def equal(first: Any, second: Any) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def masked_by_hand(training: st.SparseTraining, masters: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    weights = dict(masters)
    for name, layer in training.masks.layers.items():
        weights[f"{prefix}{name}.weight"] = masters[f"{prefix}{name}.weight"] * layer.mask
    return weights


@pytest.mark.parametrize("method", ["fst", "s_ste", SLOPE, {"preset": "asp_one_shot", "prune_at": 2}], ids=str)
def test_a_plain_model_with_the_sparse_state_dict_computes_what_was_evaluated(method: Any) -> None:
    model = mlp()
    training = sparse(model, method, 8)
    x = torch.randn(4, 16)
    expected, masters = model(x), copy.deepcopy(model.state_dict())
    found, given = st.sparse_state_dict(model), st.sparse_state_dict(model, masters)
    assert equal(found, given)
    assert equal(model.state_dict(), masters)
    plain = mlp(seed=1)
    plain.load_state_dict(found)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
    for _, layer in training.masks.layers.items():
        zeros = (found[next(key for key in found if model.get_submodule(key.split(".")[0]) is layer)] == 0).sum()
        assert zeros == (0 if method is SLOPE else layer.weight.numel() // 2)
    training.finish()
    assert equal(st.sparse_state_dict(model), model.state_dict())
    if method != "s_ste":  # which measures its scale again
        torch.testing.assert_close(dict(model.state_dict()), dict(found))


def test_dense_phases_have_the_plain_state_dict() -> None:
    model = mlp()
    sparse(model, {"preset": "asp_one_shot", "prune_at": 20})
    assert equal(st.sparse_state_dict(model), model.state_dict())


def test_weights_inside_checkpoint_wrappers_are_sparse_in_a_state_dict() -> None:
    model = nn.Sequential(mlp(), nn.Linear(8, 8))
    apply_activation_checkpointing(model, check_fn=lambda module: module is model[0])
    training = st.SparseTraining(model, torch.optim.SGD(model.parameters(), 0.1), "asp_one_shot", 2, verbose=False)
    training._phases.run.clock = 1
    training._phases.enter()
    state = st.sparse_state_dict(model)
    assert list(state) == list(model.state_dict())
    assert [(state[name] == 0).float().mean() for name in ("0.0.weight", "0.2.weight")] == [0.5, 0.5]


def test_adapters_may_be_left_out() -> None:
    model = mlp()
    training = sparse(model, SLOPE, 8)
    expected = masked_by_hand(training, model.state_dict())
    assert equal(st.sparse_state_dict(model, model.state_dict(), merge_adapters=False), expected)
    assert equal(st.sparse_state_dict(model, merge_adapters=False), expected)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.parallel.DistributedDataParallel,
    "compiled data parallel": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m), backend="eager"),
    "compiled block": lambda model: nn.Sequential(torch.compile(model, backend="eager")),  # type: ignore[call-overload]
    "Fabric": lambda model: Fabric(accelerator="cpu", devices=1).setup(model),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_keys_are_those_of_the_model_in_any_wrapper(wrapper: str, tmp_path: Path) -> None:
    if "parallel" in wrapper:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    inner = mlp()
    model = WRAPPERS[wrapper](inner)
    training = sparse(inner, steps=0)
    expected = masked_by_hand(training, inner.state_dict())
    found = st.sparse_state_dict(model)
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))
    assert equal(st.sparse_state_dict(model, model.state_dict()), found)
    if wrapper != "compiled block":  # a state dict of the plain model, as trainers gather it
        assert equal(st.sparse_state_dict(model, inner.state_dict()), expected)


@pytest.mark.parametrize(
    "wrapper", [name for name in WRAPPERS if name != "compiled block"]
)  # which is a part of a plain model
def test_the_engine_names_layers_as_in_the_plain_model(wrapper: str, tmp_path: Path) -> None:
    if "parallel" in wrapper:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    model = WRAPPERS[wrapper](mlp())
    training = sparse(model, steps=0)
    assert list(training.masks.layers) == ["0", "2"]
    other = sparse(mlp(), steps=0)
    other.load_state_dict(training.state_dict())
    assert equal(other.masks.codes, training.masks.codes)


def test_parts_of_a_model() -> None:
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(16, 4)})
    training = sparse(model, steps=0)
    expected = masked_by_hand(training, model.state_dict())
    body = {name.removeprefix("body."): value for name, value in expected.items() if name.startswith("body.")}
    assert equal(st.sparse_state_dict(model["body"]), body)
    assert equal(st.sparse_state_dict(model["body"][0]), {key[2:]: body[key] for key in ("0.weight", "0.bias")})
    part = {"body.0.weight": model["body"][0].weight.detach(), "other": torch.ones(2)}
    found = st.sparse_state_dict(model, part)
    assert equal(found, {"body.0.weight": expected["body.0.weight"], "other": torch.ones(2)})
    assert part["body.0.weight"].count_nonzero() == 512  # what was given is as it was


def test_a_module_under_two_names_and_tied_weights_are_sparse_under_every_name() -> None:
    block = nn.Linear(16, 16)
    model = nn.ModuleDict(
        {"blocks": nn.Sequential(block, block), "embed": nn.Embedding(8, 16), "head": nn.Linear(16, 8)}
    )
    model["head"].weight = model["embed"].weight
    training = sparse(model, steps=0)
    assert list(training.masks.layers) == ["blocks.0"]
    for found in (st.sparse_state_dict(model), st.sparse_state_dict(model, model.state_dict())):
        assert torch.equal(found["blocks.0.weight"], block.weight * block.mask)
        assert torch.equal(found["blocks.1.weight"], found["blocks.0.weight"])
        assert torch.equal(found["head.weight"], model["embed"].weight)
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


class Shared(LightningModule):
    """The second name of a shared block is the one that loading a state dict writes last."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Linear(16, 16)
        self.blocks = nn.Sequential(block, nn.Tanh(), block)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.blocks(batch) - batch.flip(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_saves_a_shared_module_sparse_under_every_name(tmp_path: Path) -> None:
    module = Shared()
    trainer = Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
        callbacks=[SparseTrainingCallback({"preset": "fst", "dense_tail": 0})],
    )  # fmt: skip
    outputs: list[Tensor] = []
    x = torch.randn(4, 16)

    def save(*_: Any) -> None:
        trainer.save_checkpoint(tmp_path / "shared.ckpt")
        outputs.append(module.blocks(x).detach())

    module.on_train_end = save  # type: ignore[method-assign, assignment]
    trainer.fit(module, DataLoader(torch.randn(12, 16), 4))
    loaded = Shared.load_from_checkpoint(tmp_path / "shared.ckpt")
    torch.testing.assert_close(loaded.blocks(x), outputs[0])


def test_parameters_are_returned_themselves_where_they_are_asked_for() -> None:
    model = mlp()
    sparse(model, steps=0)
    found = evaluated_in_state_dicts(model.modules())
    assert model.state_dict(keep_vars=True)["0.weight"] is model[0].weight
    assert int((st.sparse_state_dict(model)["0.weight"] == 0).sum()) == 256  # beside a hook that is there
    found.close()
    assert model.state_dict()["0.weight"].data_ptr() == model[0].weight.data_ptr()


def test_a_state_dict_of_another_model_is_refused() -> None:
    model = mlp()
    sparse(model, steps=0)
    with pytest.raises(ValueError, match=r"no weight of a masked layer, such as '0\.weight'"):
        st.sparse_state_dict(model, {"net.0.weight": torch.zeros(32, 16)})


def test_convolutions_keep_their_shape() -> None:
    model = convnet()
    training = st.SparseTraining(model, torch.optim.SGD(model.parameters()), "fst", 24, "all-conv", verbose=False)
    assert equal(st.sparse_state_dict(model), masked_by_hand(training, model.state_dict()))


def test_save_pretrained_in_mid_run_saves_what_is_evaluated(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    sparse(model, steps=0)
    tokens = torch.arange(8)[None]
    model.save_pretrained(tmp_path, state_dict=st.sparse_state_dict(model))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
