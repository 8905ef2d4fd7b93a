"""Fine-tuning a pretrained ConvNet, EfficientNet-Lite0, whose 1 × 1 convolutions can be sparse."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain.recipes.image import ImageModule

from .pretrained import EFFICIENTNET, EFFICIENTNET_FILE, folder_of

CLASSES = 1000
"""Of the pretrained head, which a new one replaces."""


class Stage(NamedTuple):
    """Blocks of one size.

    Args:
        repeats: How many.
        kernel: Side of the depthwise kernel.
        stride: Of the first.
        expansion: Channels of the depthwise convolution over those of the input.
        channels: Of the output.
    """

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution and projection (Sandler et al. 2018, figure 4b)."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        expand = [*_convolution(inputs, hidden, 1), nn.ReLU6()] if hidden != inputs else []
        depthwise = [*_convolution(hidden, hidden, stage.kernel, stride, groups=hidden), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *_convolution(hidden, stage.channels, 1))
        self.is_residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """Return channels of the stage for channels of its input, ``[batch, channels, height, width]``."""
        out: Tensor = self.layers(x)
        return x + out if self.is_residual else out


class EfficientNetLite(nn.Module):
    """A stem, stages of inverted residual blocks, a last 1 × 1 convolution, an average and a head.

    Args:
        classes: Number of classes.
        stages: Of blocks.
        stem: Channels of the stem.
        features: Channels of the last convolution.
    """

    def __init__(self, classes: int, stages: Sequence[Stage] = LITE0, stem: int = 32, features: int = 1280) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, stem, 3, stride=2), nn.ReLU6())
        blocks, channels = [], stem
        for stage in stages:
            for place in range(stage.repeats):
                blocks.append(InvertedResidual(channels, stage, 1 if place else stage.stride))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.features = nn.Sequential(*_convolution(channels, features, 1), nn.ReLU6())
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of normalised images ``[batch, 3, size, size]``, a multiple of 32."""
        logits: Tensor = self.head(self.features(self.blocks(self.stem(images))).mean((2, 3)))
        return logits


class EfficientNetModule(ImageModule):
    """EfficientNet-Lite0, trained as an :class:`ImageModule` is.

    Args:
        pretrained: The weights of ImageNet; False is a small network of that kind with random ones.
        options: Of the :class:`ImageModule`.
    """

    def __init__(self, pretrained: bool = True, **options: Any) -> None:
        super().__init__(**options)
        classes = self.hparams["classes"]
        self.model = pretrained_lite0(classes) if pretrained else EfficientNetLite(classes, LITE0[:3], 16, 64)


def pretrained_lite0(classes: int) -> EfficientNetLite:
    """Return EfficientNet-Lite0 with the weights of its package and a new head.

    Args:
        classes: Of the new head.

    Raises:
        ImportError: If the package is not installed.
    """
    model = EfficientNetLite(CLASSES)
    found = torch.load(folder_of(EFFICIENTNET) / "models" / EFFICIENTNET_FILE, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), found.values(), strict=True)))  # other names, the same order
    model.head = nn.Linear(model.head.in_features, classes)
    return model


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size, or halves it, and its norm.

    TensorFlow, where the weights were trained, pads right and bottom first: with a stride of 2, one more there.
    """
    before, after = (kernel - stride) // 2, (kernel - 1) // 2
    pad = [nn.ZeroPad2d((before, after, before, after))] if before != after else []
    padding = 0 if pad else after
    return [
        *pad,
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
