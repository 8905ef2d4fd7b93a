"""A small convolutional classifier, a vision transformer, and their LightningModule."""

from .model import ConvNet
from .module import ImageModule
from .transformer import VisionTransformer

__all__ = ["ConvNet", "ImageModule", "VisionTransformer"]
