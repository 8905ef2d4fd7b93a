"""A small decoder-only GPT, and its LightningModule."""

from .model import GPT
from .module import GPTModule

__all__ = ["GPT", "GPTModule"]
