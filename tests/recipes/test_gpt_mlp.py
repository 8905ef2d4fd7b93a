"""The MLP of the GPT recipe with every activation, in torch and by the fused operator."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from sparsetrain.callbacks import SparseTrainingCallback
from sparsetrain.recipes.data import TextDataModule
from sparsetrain.recipes.gpt import GPTModule
from sparsetrain.recipes.gpt.model import MLP

COMPOSITIONS: dict[str, Callable[[MLP, Tensor], Tensor]] = {
    "swiglu": lambda mlp, x: mlp.down(F.silu(mlp.gate(x)) * mlp.up(x)),
    "geglu": lambda mlp, x: mlp.down(F.gelu(mlp.gate(x)) * mlp.up(x)),
    "relu2": lambda mlp, x: mlp.down(F.relu(mlp.up(x)) ** 2),
    "gelu": lambda mlp, x: mlp.down(F.gelu(mlp.up(x))),
}


def result_and_gradients(call: Callable[[Tensor], Tensor], mlp: MLP, x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *mlp.parameters()])]


@pytest.mark.parametrize("activation", COMPOSITIONS)
def test_every_activation_is_its_composition_bit_for_bit(activation: str) -> None:
    mlp, x = MLP(16, 32, activation), torch.randn(3, 5, 16)
    expected = result_and_gradients(lambda leaf: COMPOSITIONS[activation](mlp, leaf), mlp, x)
    assert all(map(torch.equal, result_and_gradients(mlp, mlp, x), expected))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
def test_the_fused_operator_computes_the_same(activation: str) -> None:
    mlp, x = MLP(16, 32, activation, fused=True), torch.randn(3, 5, 16)
    expected = result_and_gradients(lambda leaf: COMPOSITIONS[activation](mlp, leaf), mlp, x)
    for found, want in zip(result_and_gradients(mlp, mlp, x), expected, strict=True):
        torch.testing.assert_close(found, want)
    with torch.autocast("cpu", torch.bfloat16):
        half, exact = mlp(x), COMPOSITIONS[activation](mlp, x)
    torch.testing.assert_close(half, exact, rtol=2e-2, atol=1e-2)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
def test_it_trains_sparse_and_resumes_as_the_whole_run(activation: str, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text("".join(f"{number} bottles\n" for number in range(600)))

    def run(checkpoint: Path | None) -> GPTModule:
        torch.manual_seed(0)
        data = TextDataModule(str(source), context=16, batch_size=8, cache_dir=str(tmp_path / "cache"))
        model = GPTModule(
            width=16, depth=1, heads=2, context=16, warmup_steps=2, mlp=activation, fused_activation=True
        )  # fmt: skip
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
        sparse = SparseTrainingCallback({"preset": "recommended", "warmup": 0.2, "refresh_every": 3}, targets="mlp")
        trainer = Trainer(
            max_steps=10, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=0, callbacks=[sparse, saving], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
        weights = [weight for name, weight in model.named_parameters() if ".mlp." in name]
        assert {float((weight == 0).float().mean()) for weight in weights} == {0.5}
        return model

    whole = run(None)
    (path,) = tmp_path.glob("*.ckpt")
    resumed = run(path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    loaded = GPTModule.load_from_checkpoint(path, strict=False)
    assert loaded.model.blocks[0].mlp.fused
