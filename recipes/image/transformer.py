"""A small vision transformer behind a convolutional stem."""

import torch
from torch import Tensor, nn

from .model import IMAGE_CHANNELS

INIT_STD = 0.02  # of positions
PATCH = 4  # pixels a side that become one token, by two convolutions of stride 2


class VisionTransformer(nn.Module):
    """Pre-norm transformer on patches of 4×4 pixels: embedded by convolutions, encoded, averaged, classified.

    Args:
        classes: Number of classes.
        width: Size of a patch's features, a multiple of ``2 * heads`` and 16.
        depth: Number of blocks.
        heads: Attention heads of a block.
        size: Side of the images in pixels, a multiple of 4.
        hidden: Size of the MLPs' hidden layer, a multiple of 16; None is 4 times the width.

    Raises:
        ValueError: If a size does not fit.

    Example:
        >>> VisionTransformer(width=32, depth=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: Dosovitskiy et al., "An Image Is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929, with the mean of the
    patches instead of a class token; the stem: Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS
    2021, arXiv 2106.14881.
    """

    def __init__(
        self,
        classes: int = 10,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        size: int = 32,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise ValueError(
                f"width is {width}: it must be a multiple of 2 * heads = {2 * heads}, so change width or heads."
            )
        if size < PATCH or size % PATCH:
            raise ValueError(f"size is {size}: it must be a multiple of {PATCH} pixels, so change it.")
        self.stem = nn.Sequential(
            nn.Conv2d(IMAGE_CHANNELS, width // 2, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(1, width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.empty((size // PATCH) ** 2, width))
        nn.init.normal_(self.position, std=INIT_STD)
        block = nn.TransformerEncoderLayer(
            width, heads, hidden or 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        for parameter in self.blocks.parameters():
            if parameter.dim() >= 2:
                nn.init.xavier_uniform_(parameter)  # the encoder's blocks are copies of one
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` for normalised images, float ``[batch, 3, size, size]``."""
        features = self.stem(images).flatten(2).transpose(1, 2)  # [batch, patches, width]
        logits: Tensor = self.head(self.blocks(features + self.position).mean(1))
        return logits
