"""Tasks: what is trained, on which data, which layers are sparse, for how long, and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule

from sparsetrain.recipes.data import ImageDataModule, TextDataModule
from sparsetrain.recipes.gpt import GPTModule
from sparsetrain.recipes.image import ImageModule

from .efficientnet import EfficientNetModule
from .encoder import EncoderModule, PackageDataModule
from .last_blocks import HiddenStateDataModule, LastBlocksModule
from .scaled import ScaledGPTModule

MAIN_ROWS = (
    "dense", "recommended", "recommended, dense tail 1/6", "asp_one_shot", "s_ste, transposable",
    "sr_ste, transposable, λ 2e-3",
)  # fmt: skip
"""Of tasks beside the first ones."""

ROBUST_ROWS = ("dense", "recommended", "asp_one_shot")
"""Of tasks that change one number of another."""


@dataclass(frozen=True)
class Task:
    """Everything of a run but its method and its seed.

    Args:
        name: In tables and files.
        subject: Model, data and batch in words.
        module: The model's class; it must log ``val/loss``.
        module_options: Its arguments.
        data: The data module's class; it must take ``seed``.
        data_options: Its arguments but the seed.
        targets: Which layers become sparse.
        steps: Optimizer steps of a run.
        accuracy: The logged metric that is the accuracy; empty if there is none.
        precision: Of the trainer.
        rows: The methods that are compared unless others are named; empty for all.
    """

    name: str
    subject: str
    module: type[LightningModule]
    module_options: Mapping[str, Any]
    data: type[LightningDataModule]
    data_options: Mapping[str, Any]
    targets: str | Sequence[str]
    steps: int
    accuracy: str = ""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    rows: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return what a run's numbers depend on as plain values."""
        return {
            "module": self.module.__name__,
            "module_options": dict(self.module_options),
            "data": self.data.__name__,
            "data_options": dict(self.data_options),
            "targets": self.targets if isinstance(self.targets, str) else list(self.targets),
            "steps": self.steps,
            "accuracy": self.accuracy,
            "precision": self.precision,
        }


def _gpt(
    model: str,
    width: int,
    depth: int,
    heads: int,
    context: int,
    batch: int,
    max_bytes: int | None,
    steps: int,
    validation_blocks: int = 256,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    **options: Any,
) -> Task:
    return Task(
        name=f"GPT {model}",
        subject=f"Byte-level GPT of width {width} with {depth} blocks on Python source code, {batch} × {context} bytes "
        "a step, AdamW",
        module=GPTModule,
        module_options={"width": width, "depth": depth, "heads": heads, "context": context, **options},
        data=TextDataModule,
        data_options={
            "context": context,
            "batch_size": batch,
            "validation_blocks": validation_blocks,
            "max_bytes": max_bytes,
        },
        targets="mlp",
        steps=steps,
        precision=precision,
    )


def _llama(
    model: str, width: int, depth: int, heads: int, context: int, batch: int, max_bytes: int, steps: int, **options: Any
) -> Task:
    return replace(
        _gpt(model, width, depth, heads, context, batch, max_bytes, steps, kv_heads=heads // 2, **options),
        name=f"Llama {model}",
        subject=f"Byte-level Llama of width {width} with {depth} blocks, two queries to a key, on Python source code, "
        f"{batch} × {context} bytes a step, AdamW",
        targets="mlp",
    )


def _vit(model: str, width: int, depth: int, heads: int, images: int, size: int, batch: int, steps: int) -> Task:
    return replace(
        _image(model, (width,), images, size, batch, steps),
        name=f"ViT {model}",
        subject=f"Vision transformer of width {width} with {depth} blocks on patches of 4 × 4 pixels of "
        f"{images:,} generated images of {size} × {size} pixels in ten classes, a tenth of them held out, {batch} "
        "images a step, AdamW",
        module_options={"widths": (width,), "blocks": depth, "heads": heads, "size": size},
        targets="all-linear",
    )


def _image(model: str, widths: tuple[int, ...], images: int, size: int, batch: int, steps: int) -> Task:
    channels = "-".join(map(str, widths))
    return Task(
        name=f"image {model}",
        subject=f"Residual ConvNet of {channels} channels on {images:,} generated images of {size} × {size} pixels in "
        f"ten classes, a tenth of them held out, {batch} images a step, AdamW",
        module=ImageModule,
        module_options={"widths": widths},
        data=ImageDataModule,
        data_options={"max_images": images, "size": size, "batch_size": batch},
        targets=["all-linear", "all-conv"],
        steps=steps,
        accuracy="validation/accuracy",
    )


def _efficientnet(model: str, images: int, size: int, batch: int, steps: int, pretrained: bool) -> Task:
    scaled = {"mean": (0.498,) * 3, "std": (0.502,) * 3}  # as ImageNet was
    network = "EfficientNet-Lite0, pretrained on ImageNet and fine-tuned" if pretrained else "A small EfficientNet-Lite"
    return replace(
        _image(model, (), images, size, batch, steps),
        name=f"EfficientNet {model}",
        subject=f"{network} on {images:,} generated images of {size} × {size} pixels in ten classes, a "
        f"tenth of them held out, {batch} images a step, AdamW",
        module=EfficientNetModule,
        module_options={"pretrained": pretrained, "learning_rate": 2e-3, **scaled},
        rows=MAIN_ROWS,
    )


def _encoder(model: str, steps: int, **options: Any) -> Task:
    return Task(
        name=f"encoder {model}",
        subject="Sentence encoder MiniLM-L6, fine-tuned to tell from which of the ten largest packages of Python's "
        "standard library 64 tokens of source code come, 8 pieces a step, AdamW",
        module=EncoderModule,
        module_options={"pretrained": not options},
        data=PackageDataModule,
        data_options={**options, "pretrained": not options},
        targets="all-linear",
        steps=steps,
        accuracy="val/accuracy",
        rows=MAIN_ROWS,
    )


def _last_blocks(model: str, blocks: int, steps: int, **options: Any) -> Task:
    return Task(
        name=f"last blocks {model}",
        subject=f"The last {blocks} blocks of SmolLM2-135M, fine-tuned on Python source code, 2 × 128 tokens a step, "
        "AdamW",
        module=LastBlocksModule,
        module_options={"blocks": blocks, "pretrained": not options},
        data=HiddenStateDataModule,
        data_options={"blocks": blocks, **options, "pretrained": not options},
        targets="all-linear",
        steps=steps,
        rows=MAIN_ROWS,
    )


def _small_gpt(words: str, rows: tuple[str, ...], **changes: Any) -> Task:
    """Return the small GPT with options of its own, a factor of its steps, or a factor of the loss."""
    options = {"width": 128, "batch": 16, "steps": 300, **changes}
    factor = options.pop("loss_factor", None)
    width, batch, steps = (options.pop(name) for name in ("width", "batch", "steps"))
    task = _gpt("small", width, 4, 4, 128, batch, 8_000_000, steps, **options)
    task = replace(task, name=f"GPT small, {words}", subject=f"{task.subject}, {words}", rows=rows)
    if factor is None:
        return task
    return replace(task, module=ScaledGPTModule, module_options={**task.module_options, "loss_factor": factor})


def _small_llama(words: str, steps: int = 300, **options: Any) -> Task:
    """Return the small Llama with options of its own or another number of steps."""
    task = _llama("small", 128, 4, 4, 128, 16, 8_000_000, steps, **options)
    return replace(task, name=f"Llama small, {words}", subject=f"{task.subject}, {words}", rows=MAIN_ROWS)


TASKS: dict[str, dict[str, Task]] = {
    "gpt": {
        "tiny": _gpt("tiny", 32, 2, 2, 32, 4, 300_000, steps=40, validation_blocks=16),
        "small": _gpt("small", 128, 4, 4, 128, 16, 8_000_000, steps=300),
        "124M": _gpt(
            "124M", 768, 12, 12, 1024, 32, None, steps=2000, precision="bf16-mixed",
            learning_rate=6e-4, warmup_steps=100,
        ),
    },
    "llama": {
        "tiny": _llama("tiny", 32, 2, 2, 32, 4, 300_000, steps=40),
        "small": _llama("small", 128, 4, 4, 128, 16, 8_000_000, steps=300),
    },
    "image": {
        "tiny": _image("tiny", (16,), 200, 16, 16, steps=40),
        "small": _image("small", (32, 64, 128), 20_000, 32, 64, steps=600),
    },
    "vit": {
        "tiny": _vit("tiny", 32, 2, 2, 200, 16, 16, steps=40),
        "small": _vit("small", 64, 4, 4, 20_000, 32, 32, steps=600),
    },
    "efficientnet": {
        "tiny": _efficientnet("tiny", 200, 32, 16, steps=40, pretrained=False),
        "small": _efficientnet("small", 4_000, 64, 16, steps=600, pretrained=True),
    },
    "encoder": {
        "tiny": _encoder("tiny", 30, pieces=60, context=16),
        "small": _encoder("small", 200),
    },
    "last-blocks": {
        "tiny": _last_blocks("tiny", 1, 20, sequences=48, context=16),
        "small": _last_blocks("small", 4, 80),
    },
    "gpt-long": {"small": _small_gpt("×5 steps", MAIN_ROWS, steps=1500)},
    "llama-long": {"small": _small_llama("×5 steps", steps=1500)},
    "image-long": {
        "small": replace(
            _image("small", (32, 64, 128), 20_000, 32, 64, steps=3000), name="image small, ×5 steps", rows=MAIN_ROWS
        )
    },
    "encoder-long": {"small": replace(_encoder("small", 600), name="encoder small, ×3 steps")},
    "llama-short": {"small": _small_llama("×½ steps", steps=150)},
    "llama-all-linear": {"small": replace(_small_llama("attention too"), targets="all-linear")},
    "gpt-muon": {
        "small": _small_gpt("Muon", MAIN_ROWS, optimizer="muon", learning_rate=1.2e-2),
    },
    "llama-muon": {"small": _small_llama("Muon", optimizer="muon", learning_rate=1.2e-2)},
    "gpt-loss-x10": {"small": _small_gpt("loss ×10", ROBUST_ROWS, loss_factor=10.0)},
    "gpt-loss-x0.1": {"small": _small_gpt("loss ×0.1", ROBUST_ROWS, loss_factor=0.1)},
    "gpt-lr-x4": {"small": _small_gpt("learning rate ×4", ROBUST_ROWS, learning_rate=8e-3)},
    "gpt-lr-x2": {"small": _small_gpt("learning rate ×2", ROBUST_ROWS, learning_rate=4e-3)},
    "gpt-lr-x0.5": {"small": _small_gpt("learning rate ×½", ROBUST_ROWS, learning_rate=1e-3)},
    "gpt-batch-x2": {"small": _small_gpt("batch ×2", ROBUST_ROWS, batch=32)},
    "gpt-batch-x0.5": {"small": _small_gpt("batch ×½", ROBUST_ROWS, batch=8)},
    "gpt-width-x2": {"small": _small_gpt("width ×2", ROBUST_ROWS, width=256)},
    "gpt-width-x0.5": {"small": _small_gpt("width ×½", ROBUST_ROWS, width=64)},
}  # fmt: skip
"""By name and by the model's size: tiny is for tests, 124M for a GPU, on all there is to read."""

MODELS = ("tiny", "small", "124M")
