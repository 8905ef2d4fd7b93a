"""``StreamedBlocks``: blocks of text without end, read while training, and a position that is saved."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsetrain.hardware.extras import require

from .sources import text_rows


class StreamedBlocks:
    """Batches of bytes of one rank, in the order of the source; after its end it begins again.

    Every rank reads documents of its own: files of its own if their number is a multiple of the ranks, every
    ``world``-th document otherwise. Nothing is downloaded or cached before it is read.

    Args:
        source: As of :func:`.text_rows`.
        split: Which split of a hub dataset.
        text_column: The column that holds the text.
        context: Tokens a model sees; a block has one more.
        batch_size: Blocks of a batch, per rank.
        rank: This process.
        world: Number of processes.

    Raises:
        ValueError: If there is no such split or column, or not one batch of text for a rank.
        ImportError: If ``datasets`` is not installed.
        FileNotFoundError: If the source is neither a path nor reachable on the hub.

    Example:
        >>> stream, resumed = (StreamedBlocks(context=8, batch_size=2) for _ in range(2))
        >>> batches = iter(stream)
        >>> next(batches).shape
        torch.Size([2, 9])
        >>> resumed.load_state_dict(stream.state_dict())
        >>> torch.equal(next(batches), next(iter(resumed)))
        True
    """

    def __init__(
        self,
        source: str | None = None,
        split: str = "train",
        text_column: str = "text",
        context: int = 128,
        batch_size: int = 16,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if context < 1 or batch_size < 1:
            raise ValueError(f"context is {context} and batch_size {batch_size}: both must be at least 1.")
        require("datasets", "recipes", "reading text")
        from datasets.distributed import split_dataset_by_node

        self._rows = split_dataset_by_node(text_rows(source, split, streaming=True), rank, world)
        self._source, self._column, self._shape = source, text_column, (batch_size, context + 1)
        self._left = bytearray()  # bytes that are read and in no batch yet

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches uint8 ``[batch, context + 1]``."""
        batch, length = self._shape
        size, found = batch * length, True
        while found:
            found = False
            for row in self._rows:
                self._left += self._text(row)
                while len(self._left) >= size:
                    taken, found = self._left[:size], True
                    del self._left[:size]
                    yield torch.frombuffer(taken, dtype=torch.uint8).view(batch, length)
            self._rows.load_state_dict(None)  # datasets begins every pass at the position that was loaded
        raise ValueError(
            f"source {self._source!r} has less than a batch for this rank, {batch} blocks of {length} bytes: give it "
            "more text, or lower context or batch_size."
        )

    def _text(self, row: dict[str, Any]) -> bytes:
        text = row.get(self._column, "")
        if self._column not in row or not isinstance(text, str | None):
            raise ValueError(
                f"text_column is {self._column!r}: it must name strings, and a row of the source has {sorted(row)}."
            )
        return f"{text}\n".encode() if text else b""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as plain values that JSON can hold."""
        return {"rows": self._rows.state_dict(), "left": self._left.decode("latin-1")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a position; of the same source, on as many ranks."""
        self._rows.load_state_dict(state["rows"])
        self._left = bytearray(state["left"], "latin-1")
