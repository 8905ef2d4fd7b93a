"""Documents to arrays of bytes, and arrays to blocks."""

import os
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparsetrain.hardware.extras import require


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


def split_documents(
    documents: Any, fraction: float, max_bytes: int | None = None, num_proc: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pack documents into two arrays of bytes.

    A document's side depends on its own bytes alone; where that leaves a side empty, the text is cut in two.

    Args:
        documents: Rows of one text column.
        fraction: Share of the documents for the second array.
        max_bytes: Stop reading after this many bytes.
        num_proc: Processes that encode.

    Returns:
        uint8 ``[bytes]`` twice: training, validation.
    """
    (column,) = documents.column_names
    documents, surplus = (documents, 0) if max_bytes is None else _first_bytes(documents, column, max_bytes)
    sides = (bytearray(), bytearray())
    side = 0
    for table in _encoded(documents, column, fraction, num_proc).with_format("arrow").iter(256):
        for tokens, side in zip(table.column("tokens"), table.column("held_out").to_pylist(), strict=True):
            sides[side].extend(tokens.as_buffer())
    if surplus:
        sides[side][-1 - surplus :] = b"\n"
    if not all(sides):
        whole = sides[0] or sides[1]
        cut = int(len(whole) * (1 - fraction))
        sides = (whole[:cut], whole[cut:])
    train, validation = (torch.from_numpy(np.frombuffer(side, np.uint8)) for side in sides)
    return train, validation


def _first_bytes(documents: Any, column: str, max_bytes: int) -> tuple[Any, int]:
    """Return the first documents that have so many bytes together, and the surplus bytes of the last of them."""
    size = 0
    for count, row in enumerate(documents, start=1):
        size += len((row[column] or "").encode())
        if size >= max_bytes:
            return documents.select(range(count)), size - max_bytes
    return documents, 0


def _encoded(documents: Any, column: str, fraction: float, num_proc: int | None) -> Any:
    datasets = require("datasets", "recipes", "TextDataModule")
    folders = {os.path.dirname(file["filename"]) for file in documents.cache_files}
    return documents.map(
        encode_documents,
        batched=True,
        batch_size=256,
        writer_batch_size=256,
        remove_columns=[column],
        features=datasets.Features(tokens=datasets.Value("large_binary"), held_out=datasets.Value("int8")),
        fn_kwargs={"column": column, "fraction": fraction},
        num_proc=num_proc and max(1, min(num_proc, len(documents))),
        keep_in_memory=not all(os.access(folder, os.W_OK) for folder in folders),
    )


def encode_documents(rows: dict[str, list[str | None]], column: str, fraction: float) -> dict[str, list[Any]]:
    r"""Turn texts into bytes that end with a line break, and choose their sides; empty texts are left out.

    Args:
        rows: Texts under one column.
        column: Its name.
        fraction: Share of the documents that is held out.

    Returns:
        ``tokens``: bytes; ``held_out``: 0 or 1.

    Example:
        >>> encode_documents({"text": ["a", None, "b"]}, "text", 0.5)
        {'tokens': [b'a\n', b'b\n'], 'held_out': [0, 1]}
    """
    texts = [text.encode() for text in rows[column] if text]
    return {
        "tokens": [text + b"\n" for text in texts],
        "held_out": [int(zlib.crc32(text) < fraction * 2**32) for text in texts],
    }
