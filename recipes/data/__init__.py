"""Data of the recipes: text through Hugging Face ``datasets``."""

from .resumable import ResumableLoader
from .text import TextDataModule

__all__ = ["ResumableLoader", "TextDataModule"]
