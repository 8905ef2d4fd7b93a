"""Data of the recipes: text and images through Hugging Face ``datasets``."""

from .images import ImageDataModule
from .resumable import ResumableLoader
from .text import TextDataModule

__all__ = ["ImageDataModule", "ResumableLoader", "TextDataModule"]
