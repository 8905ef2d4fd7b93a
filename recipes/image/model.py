"""A residual ConvNet whose layers behind the stem have sizes that 2:4 sparsity can use."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_CHANNELS = 3
CHANNEL_STEP = 16  # of channels, so that every inner convolution and linear layer can be 2:4 sparse


class ConvNet(nn.Module):
    """Residual convolutional classifier: stem, stages of blocks, average over the image, MLP, head.

    The stem and every stage but the first halve the resolution.

    Args:
        classes: Number of classes.
        widths: Channels of each stage, multiples of 16.
        blocks: Residual blocks of a stage.
        norm: ``"group"`` (16 channels a group) or ``"batch"``.
        hidden: Size of the MLP's hidden layer, a multiple of 16; None is 4 times the last stage's channels.

    Raises:
        ValueError: If a size does not fit.

    Example:
        >>> model = ConvNet(widths=(16, 32))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int = 1,
        norm: Literal["group", "batch"] = "group",
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes is {classes}: it must be at least 2.")
        if not widths or any(width < 1 or width % CHANNEL_STEP for width in widths):
            raise ValueError(
                f"widths is {list(widths)}: it must hold one multiple of {CHANNEL_STEP} for each stage, so change it."
            )
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}: it must be at least 1.")
        if norm not in ("group", "batch"):
            raise ValueError(f"norm is {norm!r}: it must be 'group' or 'batch'.")
        if hidden is not None and (hidden < 1 or hidden % CHANNEL_STEP):
            raise ValueError(f"hidden is {hidden}: it must be a multiple of {CHANNEL_STEP}, or None.")
        self.stem = nn.Conv2d(IMAGE_CHANNELS, widths[0], 3, stride=2, padding=1, bias=False)
        self.stem_norm = _norm(norm, widths[0])
        self.stages = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(before, width, 1 if stage == 0 else 2, norm),
                *(ResidualBlock(width, width, 1, norm) for _ in range(blocks - 1)),
            )
            for stage, (before, width) in enumerate(pairwise([widths[0], *widths]))
        )
        self.mlp_norm = nn.LayerNorm(widths[-1])
        self.mlp = MLP(widths[-1], hidden or 4 * widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` for normalised images, float ``[batch, 3, height, width]``."""
        x = F.relu(self.stem_norm(self.stem(images)))
        for stage in self.stages:
            x = stage(x)
        pooled = x.mean((2, 3))  # [batch, channels]
        pooled = pooled + self.mlp(self.mlp_norm(pooled))
        logits: Tensor = self.head(pooled)
        return logits


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``[batch, inputs, height, width]`` to ``[batch, outputs, height / stride, width / stride]``."""
        branch = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class MLP(nn.Module):
    """GELU feed-forward layer on features."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every row: ``[batch, width]`` to the same."""
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels // CHANNEL_STEP, channels)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn bytes into numbers around zero; the memory layout stays.

    Args:
        images: uint8 ``[batch, channels, height, width]``.
        mean: Float ``[channels]``, of pixel values between 0 and 1; its dtype is the result's.
        std: Float ``[channels]``, likewise.

    Raises:
        ValueError: If the images are no such bytes.

    Example:
        >>> normalise(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([0.5]), torch.tensor([0.25]))
        tensor([[[[2.]]]])
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != mean.numel():
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}: they must be torch.uint8 "
            f"[batch, {mean.numel()}, height, width], so leave the normalisation to the module."
        )
    return (images.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]
