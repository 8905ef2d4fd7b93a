"""A small convolutional classifier, and its LightningModule."""

from .model import ConvNet
from .module import ImageModule

__all__ = ["ConvNet", "ImageModule"]
