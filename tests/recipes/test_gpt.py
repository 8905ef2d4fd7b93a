import pytest
import torch
from lightning.pytorch import Trainer

from sparsetrain.recipes.data import TextDataModule
from sparsetrain.recipes.gpt import GPT, GPTModule
from sparsetrain.selection import select_layers

SMALL = {"width": 32, "depth": 2, "heads": 2, "context": 16}


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_a_later_token_never_changes_earlier_logits(positions: str, mlp: str) -> None:
    model = GPT(**SMALL, positions=positions, mlp=mlp)
    tokens = torch.randint(0, 256, (2, 16))
    before = model(tokens)
    tokens[:, 9] += 1
    tokens %= 256
    after = model(tokens)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


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
    [({"width": 30, "heads": 4}, "multiple of"), ({"positions": "alibi"}, "'alibi'"), ({"mlp": "relu"}, "'relu'")],
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
