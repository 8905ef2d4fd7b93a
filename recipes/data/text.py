"""``TextDataModule``: byte-level blocks of text, read through ``datasets``."""

from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from .documents import Blocks, split_documents
from .resumable import ResumableLoader, as_is
from .sources import text_rows


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
        cache_dir: Where ``datasets`` keeps its cache; None is its default. A saved dataset's cache lies in its folder.
        num_proc: Processes that read and encode; None works in this one.

    Raises:
        ValueError: If a value is out of range, or the source has too little text, no such column or no such split.
        ImportError: If ``datasets`` is not installed.
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
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction is {validation_fraction}: it must lie between 0 and 1.")
        if context < 1 or batch_size < 1:
            raise ValueError(f"context is {context} and batch_size {batch_size}: both must be at least 1.")
        for name, value in (("max_bytes", max_bytes), ("num_proc", num_proc), ("validation_blocks", validation_blocks)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1, or None.")
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
        train, validation = split_documents(
            documents, options["validation_fraction"], options["max_bytes"], options["num_proc"]
        )
        blocks = options["validation_blocks"]
        self.train_blocks = Blocks(train, length)
        self.validation_set = Blocks(validation if blocks is None else validation[: blocks * length], length)
        for name, part in (("training", self.train_blocks), ("validation", self.validation_set)):
            if len(part) < options["batch_size"]:
                raise ValueError(
                    f"source {options['source']!r} has {len(part)} {name} blocks of {length} bytes: a batch needs "
                    f"{options['batch_size']}, so give it more text, or lower context or batch_size."
                )

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return batches uint8 ``[batch, context + 1]``: shuffled and resumable; in order to overfit a few."""
        assert self.train_blocks is not None
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return DataLoader(self.train_blocks, self.hparams["batch_size"], collate_fn=as_is)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        options = self.hparams
        return ResumableLoader(
            self.train_blocks, options["batch_size"], options["seed"], rank, world, options["num_workers"]
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return validation batches uint8 ``[batch, context + 1]`` in order."""
        assert self.validation_set is not None
        return DataLoader(self.validation_set, 4 * self.hparams["batch_size"], collate_fn=as_is)

    def _documents(self) -> Any:
        """Return a ``datasets.Dataset`` with one text per row."""
        options = self.hparams
        column = options["text_column"]
        rows = text_rows(
            options["source"], options["split"], cache_dir=options["cache_dir"], num_proc=options["num_proc"]
        )
        if column not in rows.column_names:
            raise ValueError(f"text_column is {column!r}: the source has {rows.column_names}, so name one of them.")
        kind = getattr(rows.features[column], "dtype", rows.features[column])
        if kind not in ("string", "large_string"):
            raise ValueError(f"text_column {column!r} holds {kind}: it must hold strings, so name another column.")
        return rows.select_columns([column])
