import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from sparsetrain.layers.selection.select_layers import select_layers
from sparsetrain.recipes.cli.main import main
from sparsetrain.recipes.cli.recipe_files import recipe_files
from sparsetrain.recipes.data import ImageDataModule
from sparsetrain.recipes.data.image_rows import Images
from sparsetrain.recipes.image import ConvNet, ImageModule

RECIPES = [name for name in recipe_files() if name.startswith("image_")]
SMALL: dict[str, Any] = {"widths": (16, 32)}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip
TINY = [
    "--model.widths=[16,16]", "--data.max_images=400", "--data.size=16", "--data.batch_size=16",
    "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_arguments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of so small layers wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)


def small_data(**options: Any) -> ImageDataModule:
    return ImageDataModule(**{"max_images": 400, "size": 16, "batch_size": 16, **options})


def batch(count: int = 4, size: int = 16) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    return {"image": image, "label": torch.arange(count) % 10}


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize(("widths", "blocks", "size"), [((16,), 1, 8), ((16, 32), 2, 32), ((32, 48, 64), 1, 27)])
def test_logits_have_one_row_an_image(norm: Any, widths: tuple[int, ...], blocks: int, size: int) -> None:
    model = ConvNet(7, widths, blocks, norm)
    assert model(torch.randn(3, 3, size, size)).shape == (3, 7)
    kinds = {"group": torch.nn.GroupNorm, "batch": torch.nn.BatchNorm2d}
    norms = [module for module in model.modules() if isinstance(module, tuple(kinds.values()))]
    assert len(norms) == 1 + 2 * len(widths) * blocks
    assert all(type(module) is kinds[norm] for module in norms)


def test_inner_layers_have_sizes_for_sparsity_and_the_mlp_is_found() -> None:
    model = ConvNet(widths=(16, 32), blocks=2)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and n != "stem"}
    assert {m.kernel_size for m in convolutions.values()} == {(3, 3), (1, 1)}
    assert all(m.in_channels % 16 == m.out_channels % 16 == 0 for m in convolutions.values())
    linear = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear == {"mlp.up": (128, 32), "mlp.down": (32, 128), "head": (10, 32)}
    assert [choice.name for choice in select_layers(model, "mlp").sparse] == ["mlp.up", "mlp.down"]
    assert [choice.name for choice in select_layers(model, "all-linear").sparse] == ["mlp.up", "mlp.down"]
    assert ConvNet(widths=(16,), hidden=48).mlp.up.weight.shape == (48, 16)


def test_a_vision_transformer_has_positions_and_sparse_layers() -> None:
    module = ImageModule(widths=(32,), blocks=2, heads=2, size=16)
    module.eval()
    images = batch()["image"]
    logits = module(images)
    assert logits.shape == (4, 10)
    moved = images.roll(8, dims=3)
    assert not torch.allclose(module(moved), logits)
    names = [choice.name for choice in select_layers(module.model, "mlp").sparse]
    assert names == [f"blocks.layers.{block}.linear{turn}" for block in (0, 1) for turn in (1, 2)]
    assert module.model.get_parameter("position").shape == (16, 32)
    blocks = [module.model.get_parameter(f"blocks.layers.{block}.linear1.weight") for block in (0, 1)]
    assert not torch.equal(*blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (32, 32), "heads": 2}, r"widths is \[32, 32\]: a transformer \(heads=2\) has one width"),
        ({"widths": (36,), "heads": 4}, r"width is 36: it must be a multiple of 2 \* heads = 8"),
        ({"widths": (32,), "heads": 2, "size": 18}, "size is 18: it must be a multiple of 4 pixels"),
    ],
)
def test_transformers_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageModule(**options)


def test_an_image_never_changes_the_logits_of_another() -> None:
    module = ImageModule(**SMALL)
    images = batch()["image"]
    before = module(images)
    images[3] = 255 - images[3]
    after = module(images)
    torch.testing.assert_close(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3])


def test_the_module_normalises_bytes_and_averages_the_loss() -> None:
    module = ImageModule(**SMALL, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    examples = batch()
    scaled = examples["image"].double() / 255
    by_hand = torch.stack([(scaled[:, 0] - 0.1) / 0.5, (scaled[:, 1] - 0.2) / 0.25, scaled[:, 2] - 0.3], 1).float()
    torch.testing.assert_close(module(examples["image"]), module.model(by_hand))
    expected = -module(examples["image"]).log_softmax(-1)[range(4), examples["label"]].mean()
    torch.testing.assert_close(module.loss(examples), expected)
    assert not any("mean" in name or "std" in name for name in module.state_dict())


def test_channels_last_changes_the_memory_alone() -> None:
    plain, last = ImageModule(**SMALL), ImageModule(**SMALL, channels_last=True)
    last.load_state_dict(plain.state_dict())
    weight = last.model.get_parameter("stages.1.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    convolution = last.model.get_submodule("stages.1.0.conv1")
    convolution.register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        images = batch()["image"].contiguous(memory_format=layout)
        torch.testing.assert_close(last(images), plain(images), rtol=1e-4, atol=1e-4)
    assert seen == [True, True]


def test_the_model_compiles_into_one_graph() -> None:
    model = ConvNet(**SMALL)
    images = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": 1}, "classes is 1: it must be at least 2"),
        ({"widths": (16, 24)}, r"widths is \[16, 24\]: it must hold one multiple of 16"),
        ({"widths": ()}, r"widths is \[\]"),
        ({"blocks": 0}, "blocks is 0"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"hidden": 40}, "hidden is 40: it must be a multiple of 16"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"lr_cycle": 0}, "lr_cycle is 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\)"),
    ],
)
def test_a_wrong_value_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ImageModule(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [torch.rand(2, 3, 16, 16), torch.zeros(2, 16, 16, 3, dtype=torch.uint8)])
def test_images_that_are_no_bytes_or_lie_wrongly_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"they must be torch.uint8 \[batch, 3, height, width\]"):
        ImageModule(**SMALL)(images)


def test_more_classes_than_the_head_has_are_refused_before_training(tmp_path: Path) -> None:
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="classes is 4: the data have 10 classes"):
        trainer.fit(ImageModule(classes=4, **SMALL), small_data())


class Steps:
    """Stands in for a trainer of known length."""

    def __init__(self, steps: float) -> None:
        self.estimated_stepping_batches = steps


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_decays_matrices_and_its_rate_ends_at_the_floor(
    name: Any, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageModule, "trainer", Steps(10))
    module = ImageModule(**SMALL, optimizer=name, weight_decay=0.3, learning_rate=0.5, min_lr_ratio=0.1, warmup_steps=2)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert type(optimizer) is kind
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in matrices["params"]} == {2, 4}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:2] == pytest.approx([0.25, 0.5])
    assert rates[6] == pytest.approx(0.5 * 0.55)
    assert rates[10:] == pytest.approx([0.05, 0.05])


def test_a_run_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageModule, "trainer", Steps(math.inf))
    with pytest.raises(ValueError, match="max_steps and max_epochs are -1"):
        ImageModule(**SMALL).configure_optimizers()


def test_training_lowers_the_loss_and_checkpoints_load(tmp_path: Path) -> None:
    data = ImageDataModule(batch_size=16)
    labels = torch.arange(96) % 3
    pixels = torch.randint(0, 60, (96, 16, 16, 3))
    pixels[range(96), :, :, labels] += 190  # red, green, blue
    data.train_set = data.validation_set = Images(pixels.to(torch.uint8), labels)
    module = ImageModule(**SMALL, warmup_steps=5, learning_rate=1e-2)
    trainer = Trainer(
        max_steps=20, max_epochs=-1, num_sanity_val_steps=0, enable_checkpointing=False, default_root_dir=tmp_path,
        **QUIET,
    )  # fmt: skip
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["validation/loss"] < before["validation/loss"] - 1
    assert after["validation/accuracy"] > 0.9 > before["validation/accuracy"]
    trainer.save_checkpoint(tmp_path / "image.ckpt")
    loaded = ImageModule.load_from_checkpoint(tmp_path / "image.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))


def test_the_logged_accuracy_and_loss_are_those_of_the_whole_set(tmp_path: Path) -> None:
    data, module = small_data(batch_size=9), ImageModule(**SMALL)
    trainer = Trainer(default_root_dir=tmp_path, **QUIET)
    (logged,) = trainer.validate(module, data, verbose=False)
    assert data.validation_set is not None
    assert len(data.validation_set) % 36  # the last batch is incomplete
    with torch.no_grad():
        logits = module(data.validation_set.pixels.permute(0, 3, 1, 2))
    labels = data.validation_set.labels
    assert logged["validation/accuracy"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item())
    expected = -logits.log_softmax(-1).gather(1, labels[:, None]).mean().item()
    assert logged["validation/loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_run_resumed_inside_an_epoch_equals_the_uninterrupted_run(tmp_path: Path, norm: Any) -> None:
    def run(checkpoint: Path | None) -> ImageModule:
        torch.manual_seed(0)
        model = ImageModule(widths=(16,), norm=norm, warmup_steps=2)
        trainer = Trainer(
            max_steps=30, max_epochs=-1, val_check_interval=10, check_val_every_n_epoch=None, default_root_dir=tmp_path,
            callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1)], **QUIET,
        )  # fmt: skip
        trainer.fit(model, small_data(), ckpt_path=checkpoint, weights_only=True)
        assert trainer.current_epoch >= 1  # the run crosses the end of an epoch
        return model

    whole = run(None)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        resumed = run(path).state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in whole.state_dict().items()), path.name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore")
def test_every_image_recipe_trains(name: str, tmp_path: Path) -> None:
    short = ["--trainer.max_steps=24", "--trainer.val_check_interval=12", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", "--config", name, *TINY, *short]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert ("sparsetrain" in saved) == (name != "image_dense.yaml")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["model"]["init_args"]["widths"] == [16, 16]
    for layer in ("mlp.up", "stages.1.0.conv1", "stages.1.0.shortcut"):
        share = (saved["state_dict"][f"model.{layer}.weight"] == 0).float().mean().item()
        assert share == (0.0 if name == "image_dense.yaml" else 0.5), layer


def test_the_three_image_recipes_differ_in_their_method_alone() -> None:
    assert len(RECIPES) == 3
    plain = []
    for name in RECIPES:
        lines = recipe_files()[name].read_text().splitlines()
        assert lines[0].startswith("# ")
        assert lines[0].endswith((".", "recipes."))
        config = yaml.safe_load("\n".join(lines))
        assert config["trainer"].pop("default_root_dir") == f"runs/{name.removesuffix('.yaml')}"
        assert ("callbacks" in config["trainer"]) == (name != "image_dense.yaml")
        config["trainer"].pop("callbacks", None)
        plain.append(config)
    assert plain[0] == plain[1] == plain[2]


@pytest.mark.filterwarnings("ignore")
def test_a_trained_classifier_is_pruned_and_its_losses_are_reported(tmp_path: Path) -> None:
    dense = ["--trainer.max_steps=20", "--trainer.val_check_interval=20", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", "--config", "image_dense", *TINY, *dense]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    out = tmp_path / "out"
    command = ["prune", "--config", "image_dense_prune_retrain", "--checkpoint", str(checkpoint), "--steps", "12"]
    assert main([*command, "--output", str(out), "--trainer.val_check_interval=12", *TINY]) == 0
    rows = [line.split("|") for line in (out / "report.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert rows[0][2].strip() == "dense"
    assert all(math.isfinite(float(row[3])) for row in rows)
    weights = torch.load(out / "pruned.ckpt", weights_only=True)["state_dict"]
    assert (weights["model.mlp.up.weight"] == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.source=nowhere"], ["'nowhere'", "a folder"]),
        (["--data.max_images=10"], ["training images", "at least 16 is needed"]),
        (["--model.classes=3"], ["classes is 3", "10 classes"]),
        (["--model.norm=layer"], ["norm", "layer"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    assert main(["fit", "--config", "image_dense", *TINY, root, *arguments]) == 2
    message = capsys.readouterr().err
    (sentence,) = [line for line in message.splitlines() if line.startswith("sparsetrain: error: ")]
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in message
