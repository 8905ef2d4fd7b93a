"""``TextDataModule``: byte-level blocks of text, read through ``datasets``."""

import os
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsetrain.extras import require

from .resumable import ResumableLoader

FORMATS = {
    ".txt": "text",
    ".py": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "encodings", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
)


class Blocks(Dataset[Tensor]):
    """Consecutive blocks of one array of tokens.

    Args:
        tokens: uint8 ``[tokens]``.
        length: Tokens of a block.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.blocks = tokens[: tokens.numel() // length * length].view(-1, length)

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.blocks[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a batch uint8 ``[batch, length]``."""
        return self.blocks[torch.tensor(indices)]


class TextDataModule(LightningDataModule):
    """Text as blocks of ``context + 1`` bytes; documents go to training or validation as a whole.

    Args:
        source: A local file (.txt, .py, .md, .json, .jsonl, .parquet, .csv), a folder of such files, a dataset saved
            with ``save_to_disk``, or the id of a dataset on the hub. None is the offline default: the Python
            sources of the running interpreter's standard library.
        split: Which split of a hub dataset to read.
        text_column: The column that holds the text.
        context: Tokens a model sees; a block has one more.
        batch_size: Blocks of a batch, per process.
        validation_fraction: Share of the documents (of the text, if there is only one) held out.
        validation_blocks: Use at most this many blocks for validation.
        max_bytes: Read at most this much text.
        seed: Of the order of training blocks.
        num_workers: Of the loaders.
        cache_dir: Where ``datasets`` keeps its cache; None is its default.

    Raises:
        ValueError: If a value is out of range, or the source has too little text or no such column.
        FileNotFoundError: If the source is neither a path nor reachable on the hub.

    Example:
        >>> data = TextDataModule(max_bytes=200_000, context=64, batch_size=4)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader())).shape
        torch.Size([4, 65])
    """

    def __init__(
        self,
        source: str | None = None,
        split: str = "train",
        text_column: str = "text",
        context: int = 128,
        batch_size: int = 16,
        validation_fraction: float = 0.05,
        validation_blocks: int | None = None,
        max_bytes: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction is {validation_fraction}: it must lie between 0 and 1.")
        if context < 1 or batch_size < 1:
            raise ValueError(f"context is {context} and batch_size {batch_size}: both must be at least 1.")
        self.save_hyperparameters()
        self.train_blocks: Blocks | None = None
        self.validation_set: Blocks | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read, split and pack the text; once."""
        if self.train_blocks is not None:
            return
        options = self.hparams
        length = options["context"] + 1
        documents = self._documents()
        train, validation = split_documents(documents, options["validation_fraction"], options["max_bytes"])
        blocks = options["validation_blocks"]
        self.train_blocks = Blocks(train, length)
        self.validation_set = Blocks(validation if blocks is None else validation[: blocks * length], length)
        for name, part in (("training", self.train_blocks), ("validation", self.validation_set)):
            if len(part) < options["batch_size"]:
                raise ValueError(
                    f"source {options['source']!r} has {len(part)} {name} blocks of {length} bytes: a batch needs "
                    f"{options['batch_size']}, so give it more text, or lower context or batch_size."
                )

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled batches uint8 ``[batch, context + 1]``; resumable in the middle of an epoch."""
        assert self.train_blocks is not None
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        options = self.hparams
        return ResumableLoader(
            self.train_blocks, options["batch_size"], options["seed"], rank, world, options["num_workers"]
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return validation batches uint8 ``[batch, context + 1]`` in order."""
        assert self.validation_set is not None
        return DataLoader(self.validation_set, 4 * self.hparams["batch_size"], collate_fn=_as_is)

    def _documents(self) -> Any:
        """Return a ``datasets.Dataset`` with one text per row."""
        datasets = require("datasets", "recipes", "TextDataModule")
        source, column = self.hparams["source"], self.hparams["text_column"]
        cache = self.hparams["cache_dir"]
        datasets.disable_progress_bars()
        if source is None or Path(source).expanduser().exists():
            path = None if source is None else Path(source).expanduser()
            if path is not None and (path / "dataset_info.json").is_file():
                rows = datasets.load_from_disk(str(path))
            elif path is not None and (path / "dataset_dict.json").is_file():
                rows = datasets.load_from_disk(str(path))[self.hparams["split"]]
            else:
                files = python_sources() if path is None else text_files(path)
                kind = FORMATS[Path(files[0]).suffix]
                extra = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
                rows = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache, **extra)
        else:
            try:
                rows = datasets.load_dataset(source, split=self.hparams["split"], cache_dir=cache)
            except (ConnectionError, FileNotFoundError) as error:
                raise FileNotFoundError(
                    f"source {source!r} is no local path and could not be read from the hub: pass a file, a folder, a "
                    "saved dataset, or None for the offline default, and unset HF_HUB_OFFLINE to allow downloads."
                ) from error
        if column not in rows.column_names:
            raise ValueError(f"text_column is {column!r}: the source has {rows.column_names}, so name one of them.")
        return rows.select_columns([column])


def split_documents(documents: Any, fraction: float, max_bytes: int | None) -> tuple[Tensor, Tensor]:
    """Pack documents into two arrays of bytes.

    A document's side depends on its own bytes alone; a single document is cut in two.

    Args:
        documents: Rows of one text column.
        fraction: Share of the documents for the second array.
        max_bytes: Stop reading behind this many bytes.

    Returns:
        uint8 ``[bytes]`` twice: training, validation.
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    (column,) = documents.column_names
    for row in documents:
        text = (row[column] or "").encode()
        if max_bytes is not None:
            text = text[: max_bytes - size]
        size += len(text)
        sides[zlib.crc32(text) < fraction * 2**32].append(text + b"\n")
        if size == max_bytes:
            break
    if not all(sides):
        whole = b"".join(sides[0] + sides[1])
        cut = int(len(whole) * (1 - fraction))
        sides = ([whole[:cut]], [whole[cut:]])
    train, validation = (torch.from_numpy(np.frombuffer(b"".join(side), np.uint8).copy()) for side in sides)
    return train, validation


def python_sources() -> list[str]:
    """Return the standard library's source files, in a fixed order that mixes the packages.

    Raises:
        FileNotFoundError: If the interpreter ships without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise FileNotFoundError(
            f"the interpreter has no Python sources under {root}: pass source= a text file or folder."
        )
    return sorted(files, key=lambda file: (zlib.crc32(os.path.relpath(file, root).encode()), file))


def text_files(path: Path) -> list[str]:
    """Return the files of one format at a path, sorted.

    Raises:
        ValueError: If there is none, or the folder mixes formats.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    kinds = {FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"source {str(path)!r} holds {'several formats' if kinds else 'no text file'}: "
            f"allowed are {', '.join(FORMATS)}, one kind at a time."
        )
    return [str(file) for file in files]


def _as_is(batch: Any) -> Any:
    return batch
