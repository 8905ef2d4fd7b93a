"""Labelled images as arrays: read from rows of a ``datasets.Dataset``, batched, split by content."""

import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


class Images(Dataset[Any]):
    """Images and their labels.

    Args:
        pixels: uint8 ``[images, height, width, 3]``.
        labels: int64 ``[images]``.
        channels_last: Keep the memory of batches in the order of ``pixels``.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, channels_last: bool = False) -> None:
        self.pixels, self.labels = pixels, labels
        self.layout = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.pixels[index].permute(2, 0, 1), "label": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch: ``image`` uint8 ``[batch, 3, height, width]``, ``label`` int64 ``[batch]``."""
        chosen = torch.tensor(indices)
        image = self.pixels[chosen].permute(0, 3, 1, 2).contiguous(memory_format=self.layout)
        return {"image": image, "label": self.labels[chosen]}


def held_out(pixels: NDArray[np.uint8], fraction: float) -> NDArray[np.bool_]:
    """Choose images for validation by their own pixels alone, so equal images are on one side.

    Args:
        pixels: uint8 ``[images, height, width, 3]``.
        fraction: Share that is held out.

    Returns:
        bool ``[images]``.

    Example:
        >>> held_out(np.zeros((2, 8, 8, 3), np.uint8), 0.5).tolist()
        [False, False]
    """
    return np.fromiter((zlib.crc32(image.tobytes()) < fraction * 2**32 for image in pixels), bool, len(pixels))


def decode_rows(rows: Any, image_column: str, label_column: str, size: int) -> tuple[Any, NDArray[np.int64]]:
    """Read rows into arrays; images are cropped to their central square and resized.

    Args:
        rows: A ``datasets.Dataset`` with an image and a class number a row.
        image_column: Where the images are.
        label_column: Where the class numbers are.
        size: Height and width of the result.

    Returns:
        uint8 ``[images, size, size, 3]``, int64 ``[images]``.

    Raises:
        ValueError: If a column is missing or of another kind, or a row has no readable image or no class number.
    """
    labels = _labels(rows, label_column)
    if image_column not in rows.column_names:
        raise ValueError(f"image_column is {image_column!r}: the source has {rows.column_names}, so name one of them.")
    kind = type(rows.features[image_column]).__name__
    if kind != "Image":
        raise ValueError(f"image_column {image_column!r} holds {kind}: it must hold Image, so cast the column.")
    pixels = np.empty((len(rows), size, size, 3), np.uint8)
    images = rows.select_columns([image_column])
    for row in range(len(rows)):
        try:
            image = images[row][image_column]
            pixels[row] = _square(image, row, size)
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"the image in row {row} cannot be decoded ({type(error).__name__}): remove or mend it."
            ) from error
    return pixels, labels


def class_count(rows: Any, label_column: str, labels: NDArray[np.int64]) -> int:
    """Return the number of classes a source declares, or one more than its greatest class number."""
    declared = getattr(rows.features[label_column], "num_classes", None)
    return int(declared or labels.max(initial=-1) + 1)


def _labels(rows: Any, column: str) -> NDArray[np.int64]:
    if column not in rows.column_names:
        raise ValueError(
            f"label_column is {column!r}: the source has {rows.column_names}, so name one of them, or put the images "
            "into one folder a class."
        )
    kind = getattr(rows.features[column], "dtype", str(rows.features[column]))
    if not kind.startswith(("int", "uint")):
        raise ValueError(
            f"label_column {column!r} holds {kind}: it must hold class numbers, so convert it with "
            "class_encode_column of datasets."
        )
    values = rows.with_format(None)[column][:]
    for row, value in enumerate(values):
        if value is None or value < 0:
            raise ValueError(
                f"the label in row {row} is {value}: class numbers start at 0, and {value} means that there is none, "
                "so choose another split or remove such rows."
            )
    return np.array(values, np.int64)


def _square(image: Any, row: int, size: int) -> NDArray[np.uint8]:
    mode = getattr(image, "mode", None)
    if mode not in EIGHT_BITS:
        found = "no image" if mode is None else f"an image of mode {mode!r}"
        raise ValueError(f"row {row} holds {found}: each must hold one with 8 bits a channel, so convert or remove it.")
    image = image.convert("RGB")
    if image.size != (size, size):
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size))
    return np.asarray(image)
