import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from sparsetrain.layers.selection.select_layers import select_layers
from sparsetrain.recipes.data import TextDataModule
from sparsetrain.recipes.gpt import GPT, GPTModule
from sparsetrain.recipes.gpt.module import WarmupCosine

SMALL = {"width": 32, "depth": 2, "heads": 2, "context": 16}


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("mlp", ["swiglu", "geglu", "relu2", "gelu"])
def test_a_later_token_never_changes_earlier_logits(positions: str, mlp: str) -> None:
    model = GPT(**SMALL, positions=positions, mlp=mlp)
    tokens = torch.randint(0, 256, (2, 16))
    before = model(tokens)
    tokens[:, 9] += 1
    tokens %= 256
    after = model(tokens)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_shared_keys_and_values_are_those_of_each_head_repeated() -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "heads": 4}
    shared, whole = GPT(**sizes, kv_heads=2), GPT(**sizes)
    state = shared.state_dict()
    for name, weight in state.items():
        if name.endswith("qkv.weight"):
            q, k, v = weight.view(8, 8, 32).split([4, 2, 2])
            state[name] = torch.cat([q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)]).view(96, 32)
    whole.load_state_dict(state)
    tokens = torch.randint(0, 256, (2, 16))
    torch.testing.assert_close(shared(tokens), whole(tokens))
    assert shared.blocks[0].get_submodule("attention.qkv").weight.shape == (64, 32)
    with pytest.raises(ValueError, match="kv_heads is 3: it must divide heads = 4, or be None"):
        GPT(**sizes, kv_heads=3)


def test_rope_scores_depend_on_distance_alone() -> None:
    from sparsetrain.recipes.gpt.model import rotate

    q, k = torch.randn(8), torch.randn(8)
    rotated_q, rotated_k = (rotate(x.expand(1, 1, 12, 8))[0, 0] for x in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in range(4):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_the_tied_head_stays_dense_and_mlp_layers_are_found() -> None:
    model = GPT(**SMALL)
    report = select_layers(model, "mlp")
    assert len(report.sparse) == 6
    assert {choice.name: choice.reason for choice in select_layers(model, "head|.*up").dense}[
        "head"
    ] == "tied to embedding.weight"
    assert select_layers(GPT(**SMALL, tied=False), ["head"]).sparse
    assert not list(model.buffers())


def test_the_model_compiles_into_one_graph() -> None:
    model = GPT(**SMALL)
    tokens = torch.randint(0, 256, (2, 16))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"width": 30, "heads": 4}, "multiple of"),
        ({"positions": "alibi"}, "'alibi'"),
        ({"mlp": "relu"}, "mlp is 'relu': it must be one of .*did you mean 'relu2'"),
        ({"mlp": "gelu", "fused_activation": True}, "fused_activation is True, but mlp is 'gelu'"),
    ],
)
def test_a_wrong_size_is_named(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        GPT(**arguments)
    with pytest.raises(ValueError, match="17 positions"):
        GPT(**SMALL)(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="lr_cycle"):
        GPTModule(lr_cycle=0)


def test_training_lowers_the_loss_and_checkpoints_load(tmp_path) -> None:
    data = TextDataModule(context=16, batch_size=8, max_bytes=100_000, validation_blocks=64)
    module = GPTModule(**SMALL, warmup_steps=5, learning_rate=1e-2)
    trainer = Trainer(
        max_steps=40, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["val/loss"] < before["val/loss"] - 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3, rel=0.05)
    trainer.save_checkpoint(tmp_path / "gpt.ckpt")
    loaded = GPTModule.load_from_checkpoint(tmp_path / "gpt.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "mlp_layers", "hidden"),
    [
        ({}, ["up", "gate", "down"], 352),
        ({"mlp": "gelu"}, ["up", "down"], 512),
        ({"mlp": "geglu"}, ["up", "gate", "down"], 352),
        ({"mlp": "relu2"}, ["up", "down"], 512),
        ({"hidden": 48}, None, 48),
    ],
)
def test_layers_have_their_names_and_sizes(options: dict[str, Any], mlp_layers: list[str] | None, hidden: int) -> None:
    model = GPT(depth=1, **options)
    names = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    prefix = "blocks.0."
    expected = {prefix + "mlp." + name for name in mlp_layers or ["up", "gate", "down"]}
    assert set(names) == expected | {prefix + "attention.qkv", prefix + "attention.out", "head"}
    assert all(type(module) is torch.nn.Linear for module in names.values())
    assert names[prefix + "mlp.up"].weight.shape == (hidden, 128)
    assert names[prefix + "mlp.down"].weight.shape == (128, hidden)
    assert hidden % 16 == 0
    assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 256)


def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not() -> None:
    tied, untied = GPT(**SMALL), GPT(**SMALL, tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == 256 * 32


def test_weights_start_small_and_residual_ones_smaller() -> None:
    model = GPT(width=128, depth=8)
    deviations = {name: p.detach().std().item() for name, p in model.named_parameters() if p.dim() >= 2}
    for name, deviation in deviations.items():
        residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        assert deviation == pytest.approx(0.02 / math.sqrt(16) if residual else 0.02, rel=0.05), name


def test_dropout_acts_in_training_alone() -> None:
    model = GPT(**SMALL, dropout=0.5)
    tokens = torch.randint(0, 256, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    plain = GPT(**SMALL)
    assert torch.equal(plain(tokens), plain(tokens))
    with pytest.raises(ValueError, match=r"dropout is 1.0: it must be at least 0 and below 1"):
        GPT(dropout=1.0)


def test_the_loss_is_nats_per_token_of_a_tensor_or_a_mapping() -> None:
    module = GPTModule(**SMALL)
    blocks = torch.randint(0, 256, (4, 17), dtype=torch.uint8)
    loss = module.loss(blocks)
    expected = -module(blocks[:, :-1].long()).log_softmax(-1).gather(-1, blocks[:, 1:].long()[..., None]).mean()
    torch.testing.assert_close(loss, expected)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)
    assert torch.equal(module.loss({"tokens": blocks}), loss)
    assert torch.equal(module.loss({"input_ids": blocks}), loss)
    with pytest.raises(ValueError, match=r"the batch has the keys \['text'\]"):
        module.loss({"text": blocks})


def test_the_learning_rate_is_a_function_of_the_step_that_ends_at_its_floor() -> None:
    factor = WarmupCosine(10, 110, 0.1)
    rates = [factor(step) for step in range(200)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[60] == pytest.approx(0.55)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert rates[110:] == pytest.approx([0.1] * 90)
    assert [factor(step) for step in range(200)] == rates


class Steps:
    """Stands in for a trainer of known length."""

    def __init__(self, steps: float) -> None:
        self.estimated_stepping_batches = steps


def test_matrices_decay_and_vectors_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTModule, "trainer", Steps(10))
    module = GPTModule(**SMALL, weight_decay=0.3)
    matrices, vectors = module.configure_optimizers()["optimizer"].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))


def test_a_run_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTModule, "trainer", Steps(math.inf))
    with pytest.raises(ValueError, match="max_steps and max_epochs are -1"):
        GPTModule(**SMALL).configure_optimizers()
