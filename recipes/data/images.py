"""``ImageDataModule``: small labelled images in memory, read through ``datasets`` or generated."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from sparsetrain.hardware.extras import require

from .generated_images import CLASSES, generate_images
from .image_rows import Images, class_count, decode_rows, held_out
from .resumable import ResumableLoader, as_is

GENERATED = 20_000  # images of the offline default


class ImageDataModule(LightningDataModule):
    """Labelled images as bytes; equal images go to training or validation together.

    A batch holds ``image``: uint8 ``[batch, 3, size, size]``, and ``label``: int64 ``[batch]``.

    Args:
        source: A folder of images with one folder a class, a dataset saved with ``save_to_disk``, or the id of a
            dataset on the hub. None is the offline default: ten classes of shapes and textures, generated.
        split: Which split of a source to read.
        validation_split: Which split validates; None holds out a share of ``split``.
        image_column: The column that holds the images.
        label_column: The column that holds the class numbers.
        size: Height and width: images are cropped to their central square and resized.
        batch_size: Images of a batch, per process.
        validation_fraction: Share of the images held out, where there is no validation split.
        max_images: Use at most this many images of a split, drawn at random; None is all of a source, 20000 generated.
        seed: Of the order of training images, and of the draw of ``max_images``.
        generator_seed: Of the generated images.
        num_workers: Of the loaders.
        cache_dir: Where ``datasets`` keeps its cache; None is its default. Generated images are not cached.
        channels_last: Let batches lie in memory as ``[batch, size, size, 3]``, as a module with ``channels_last``
            wants them.

    Raises:
        ValueError: If a value is out of range, or the source has too few images, no such column or split, labels that
            are no class numbers, or an image that cannot be read.
        ImportError: If ``datasets`` is not installed and there is a source.
        FileNotFoundError: If the source is neither a path nor reachable on the hub.

    Example:
        >>> data = ImageDataModule(max_images=500, batch_size=8)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["image"].shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(
        self,
        source: str | None = None,
        split: str = "train",
        validation_split: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        size: int = 32,
        batch_size: int = 64,
        validation_fraction: float = 0.1,
        max_images: int | None = None,
        seed: int = 0,
        generator_seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction is {validation_fraction}: it must lie between 0 and 1.")
        if size < 8 or batch_size < 1:
            raise ValueError(f"size is {size} and batch_size {batch_size}: they must be at least 8 and 1.")
        if max_images is not None and max_images < 1:
            raise ValueError(f"max_images is {max_images}: it must be at least 1, or None.")
        if validation_split is not None and (source is None or validation_split == split):
            raise ValueError(
                f"validation_split is {validation_split!r}: it must name another split of a source than {split!r}, or "
                "be None to hold out a share."
            )
        self.save_hyperparameters()
        self.classes: int | None = None
        self.train_set: Images | None = None
        self.validation_set: Images | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read or generate the images and split them; once."""
        if self.train_set is not None:
            return
        options = self.hparams
        if options["source"] is None:
            pixels, labels = generate_images(
                options["max_images"] or GENERATED, options["generator_seed"], options["size"]
            )
            classes = len(CLASSES)
            sides = self._hold_out(pixels, labels)
        else:
            classes, sides = self._read()
        parts = [
            Images(torch.from_numpy(pixels), torch.from_numpy(labels), options["channels_last"])
            for pixels, labels in sides
        ]
        for name, part, needed in zip(("training", "validation"), parts, (options["batch_size"], 1), strict=True):
            if len(part) < needed:
                raise ValueError(
                    f"source {options['source']!r} has {len(part)} {name} images: at least {needed} is needed, so give "
                    "more images, or change batch_size or validation_fraction."
                )
        distinct = len(set(parts[0].labels.tolist()))
        if distinct < 2:
            raise ValueError(
                f"source {options['source']!r} has training images of {distinct} class: a classifier needs 2, so put "
                "the images of each class into a folder of its own or choose another label_column."
            )
        self.train_set, self.validation_set = parts
        self.classes = classes

    def train_dataloader(self) -> DataLoader[Any]:
        """Return training batches: shuffled and resumable; in order to overfit a few."""
        assert self.train_set is not None
        options = self.hparams
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return DataLoader(self.train_set, options["batch_size"], collate_fn=as_is)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return ResumableLoader(
            self.train_set, options["batch_size"], options["seed"], rank, world, options["num_workers"]
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches in order, the last one incomplete."""
        assert self.validation_set is not None
        return DataLoader(
            self.validation_set,
            4 * self.hparams["batch_size"],
            num_workers=self.hparams["num_workers"],
            collate_fn=as_is,
        )

    def _hold_out(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[tuple[Any, Any]]:
        """Return pixels and labels of both sides, each in the order of the source."""
        held = held_out(pixels, self.hparams["validation_fraction"])
        return [(pixels[~held], labels[~held]), (pixels[held], labels[held])]

    def _read(self) -> tuple[int, list[tuple[Any, Any]]]:
        """Return the number of classes, and pixels and labels of both sides."""
        options = self.hparams
        splits = self._splits()
        sides, classes, names = [], 0, []
        for split in filter(None, (options["split"], options["validation_split"])):
            if split not in splits:
                raise ValueError(f"split is {split!r}: source {options['source']!r} has {sorted(splits)}.")
            rows = splits[split]
            if options["max_images"] is not None and options["max_images"] < len(rows):
                # files are sorted by class, so the first ones would lack classes
                drawn = np.random.default_rng(abs(options["seed"])).permutation(len(rows))[: options["max_images"]]
                rows = rows.select(np.sort(drawn))
            column = options["label_column"]
            sides.append(decode_rows(rows, options["image_column"], column, options["size"]))
            classes = max(classes, class_count(rows, column, sides[-1][1]))
            names.append(getattr(rows.features[column], "names", None))
        if names[0] != names[-1]:
            raise ValueError(
                f"split {options['split']!r} has the classes {names[0]} and {options['validation_split']!r} "
                f"{names[-1]}: both must have the same, so mend the source or leave validation_split out."
            )
        return classes, sides if len(sides) == 2 else self._hold_out(*sides[0])

    def _splits(self) -> Any:
        """Return a mapping from the names of a source's splits to ``datasets.Dataset``."""
        datasets = require("datasets", "recipes", "ImageDataModule")
        source = self.hparams["source"]
        datasets.disable_progress_bars()
        path = Path(source).expanduser()
        return self._local(datasets, path) if path.exists() else self._hub(datasets, source)

    def _local(self, datasets: ModuleType, path: Path) -> Any:
        if (path / "dataset_info.json").is_file():
            try:
                return {self.hparams["split"]: datasets.load_from_disk(str(path))}
            except IndexError as error:  # what datasets says to a saved dataset without rows
                raise ValueError(f"source {str(path)!r} has no rows: pass a dataset with images.") from error
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        if not path.is_dir():
            raise ValueError(f"source {str(path)!r} is a file: pass a folder with one folder of images a class.")
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(path), cache_dir=self.hparams["cache_dir"])
        except FileNotFoundError as error:
            raise ValueError(
                f"source {str(path)!r} holds no image: pass a folder with one folder of images a class."
            ) from error

    def _hub(self, datasets: ModuleType, source: str) -> Any:
        try:
            return datasets.load_dataset(source, cache_dir=self.hparams["cache_dir"])
        except (ConnectionError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"source {source!r} is no local path and could not be read from the hub: pass a folder, a saved "
                "dataset, or None for the offline default, and unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE to allow "
                "downloads."
            ) from error
