"""``ImageModule``: classification with a :class:`ConvNet` or a :class:`VisionTransformer` in Lightning."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from ..optimization import require_lr_cycle, weight_decay_groups, with_warmup_cosine
from .model import IMAGE_CHANNELS, ConvNet, normalise
from .transformer import VisionTransformer

Batch = Mapping[str, Tensor]


class ImageModule(LightningModule):
    """A ConvNet or a vision transformer with AdamW or SGD and a learning rate that warms up and decays along a cosine.

    It logs ``train/loss``, ``validation/loss`` (nats per image) and ``validation/accuracy`` (between 0 and 1).

    Args:
        classes: Number of classes.
        widths: Channels of each stage, multiples of 16; of a transformer the one width.
        blocks: Residual blocks of a stage, or of the transformer.
        norm: ``"group"`` or ``"batch"``, of the ConvNet.
        hidden: Size of an MLP's hidden layer; None is 4 times the last stage's channels.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum.
        learning_rate: Peak learning rate.
        min_lr_ratio: Final learning rate as a fraction of the peak.
        warmup_steps: Optimizer steps of linear warm-up.
        lr_cycle: Length of warm-up and decay as a fraction of the run; 0.5 for a schedule that restarts half-way.
        weight_decay: Of matrices and convolutions; vectors have none.
        betas: Of AdamW.
        momentum: Of SGD.
        mean: Mean of each channel, of pixel values between 0 and 1.
        std: Standard deviation of each channel, likewise.
        channels_last: Keep convolutions and images in memory as ``[batch, height, width, channels]``.
        heads: Attention heads of a transformer's block; None is the ConvNet.
        size: Side of a transformer's images in pixels.

    Raises:
        ValueError: If a value does not fit, the data have more classes, or the learning rate is to decay over a run
            without an end.

    Example:
        >>> module = ImageModule(widths=(16,))
        >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        >>> module.loss({"image": images, "label": torch.arange(4)}).dim()
        0
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: int = 10,
        widths: tuple[int, ...] = (32, 64, 128),
        blocks: int = 1,
        norm: Literal["group", "batch"] = "group",
        hidden: int | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        learning_rate: float = 2e-3,
        min_lr_ratio: float = 0.02,
        warmup_steps: int = 20,
        lr_cycle: float = 1.0,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.9,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        channels_last: bool = False,
        heads: int | None = None,
        size: int = 32,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer is {optimizer!r}: it must be 'adamw' or 'sgd'.")
        require_lr_cycle(lr_cycle)
        if len(mean) != IMAGE_CHANNELS or len(std) != IMAGE_CHANNELS or not all(value > 0 for value in std):
            raise ValueError(
                f"mean is {mean} and std {std}: both must hold {IMAGE_CHANNELS} numbers, those of std above 0."
            )
        self.model = _model(classes, widths, blocks, norm, hidden, heads, size)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def setup(self, stage: str) -> None:
        """Check that the head has room for the classes of the data module, where there is one that counts them."""
        found = getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if found is not None and found > self.hparams["classes"]:
            raise ValueError(
                f"classes is {self.hparams['classes']}: the data have {found} classes, so set the model's classes to "
                f"{found}."
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` for images uint8 ``[batch, 3, height, width]``."""
        layout = torch.channels_last if self.hparams["channels_last"] else torch.contiguous_format
        logits: Tensor = self.model(normalise(images, self.mean, self.std).contiguous(memory_format=layout))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss in nats per image of a batch.

        Args:
            batch: ``image``: uint8 ``[batch, 3, height, width]``; ``label``: int64 ``[batch]``.
        """
        return F.cross_entropy(self(batch["image"]), batch["label"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and labels."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss and the accuracy of a batch of images and labels."""
        logits, labels = self(batch["image"]), batch["label"]
        loss = F.cross_entropy(logits, labels)
        metrics = {"validation/loss": loss, "validation/accuracy": (logits.argmax(-1) == labels).float().mean()}
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels), sync_dist=True)
        # the report of `sparsetrain prune` reads this name
        self.log("val/loss", loss, logger=False, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its per-step schedule."""
        options = self.hparams
        groups = weight_decay_groups(self.parameters(), options["weight_decay"])
        optimizer: torch.optim.Optimizer
        if options["optimizer"] == "sgd":
            momentum = options["momentum"]
            optimizer = torch.optim.SGD(groups, lr=options["learning_rate"], momentum=momentum, nesterov=momentum > 0)
        else:
            optimizer = torch.optim.AdamW(groups, lr=options["learning_rate"], betas=tuple(options["betas"]))
        total = self.trainer.estimated_stepping_batches
        return with_warmup_cosine(
            optimizer, total, options["warmup_steps"], options["min_lr_ratio"], options["lr_cycle"]
        )


def _model(
    classes: int,
    widths: tuple[int, ...],
    blocks: int,
    norm: Literal["group", "batch"],
    hidden: int | None,
    heads: int | None,
    size: int,
) -> nn.Module:
    if heads is None:
        return ConvNet(classes, widths, blocks, norm, hidden)
    if len(widths) != 1:
        raise ValueError(f"widths is {list(widths)}: a transformer (heads={heads}) has one width, so give one.")
    return VisionTransformer(classes, widths[0], blocks, heads, size, hidden)
