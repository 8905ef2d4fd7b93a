"""Tasks: what is trained, on which data, which layers are sparse, for how long, and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule

from sparsetrain.recipes.data import ImageDataModule, TextDataModule
from sparsetrain.recipes.gpt import GPTModule
from sparsetrain.recipes.image import ImageModule


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


TASKS: dict[str, dict[str, Task]] = {
    "gpt": {
        "tiny": _gpt("tiny", 32, 2, 2, 32, 4, 300_000, steps=40, validation_blocks=16),
        "small": _gpt("small", 128, 4, 4, 128, 16, 8_000_000, steps=300),
        "124M": _gpt(
            "124M", 768, 12, 12, 1024, 32, None, steps=2000, precision="bf16-mixed",
            learning_rate=6e-4, warmup_steps=100,
        ),
    },
    "image": {
        "tiny": _image("tiny", (16,), 200, 16, 16, steps=40),
        "small": _image("small", (32, 64, 128), 20_000, 32, 64, steps=600),
    },
}  # fmt: skip
"""By name and by the model's size: tiny is for tests, 124M for a GPU, on all there is to read."""

MODELS = ("tiny", "small", "124M")
