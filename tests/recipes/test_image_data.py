import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsetrain.recipes.data import ImageDataModule
from sparsetrain.recipes.data.generated_images import CLASSES, generate_images
from sparsetrain.recipes.data.image_rows import Images

datasets = pytest.importorskip("datasets")
image_files = pytest.importorskip("PIL.Image")

NAMES = ["ant", "bee", "cow"]
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), np.uint8)
LABELS = np.arange(60) // 20  # in the order of folders sorted by class


def module(source: Path | None, tmp_path: Path, **options: Any) -> ImageDataModule:
    options = {"size": 16, "batch_size": 4, "validation_fraction": 0.3, "cache_dir": str(tmp_path / "cache"), **options}
    data = ImageDataModule(None if source is None else str(source), **options)
    data.setup("fit")
    return data


def content(part: Images | None) -> dict[bytes, int]:
    assert part is not None
    return {image.numpy().tobytes(): int(label) for image, label in zip(part.pixels, part.labels, strict=True)}


def write_folder(folder: Path) -> Path:
    for number, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        path = folder / NAMES[label] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image_files.fromarray(pixels).save(path)
    return folder


def rows(pixels: np.ndarray = PIXELS, labels: Any = LABELS, names: list[str] | None = NAMES) -> Any:
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(image=datasets.Image(), label=kind)
    images = [image_files.fromarray(image) for image in pixels]
    return datasets.Dataset.from_dict({"image": images, "label": list(labels)}, features=features)


def write_sources(folder: Path) -> dict[str, Path]:
    paths = {name: folder / name for name in ("files", "splits of files", "saved", "splits")}
    write_folder(paths["files"])
    write_folder(paths["splits of files"] / "train")
    rows().save_to_disk(paths["saved"])
    datasets.DatasetDict({"train": rows(), "rest": rows(PIXELS[:8], LABELS[:8])}).save_to_disk(paths["splits"])
    return paths


def test_every_kind_of_source_gives_the_same_images(tmp_path: Path) -> None:
    expected = {image.tobytes(): int(label) for image, label in zip(PIXELS, LABELS, strict=True)}
    sides = []
    for source in write_sources(tmp_path).values():
        data = module(source, tmp_path)
        train, validation = content(data.train_set), content(data.validation_set)
        assert {**train, **validation} == expected
        assert len(train) + len(validation) == 60
        assert data.classes == 3
        sides.append(set(validation))
    assert len(sides) == 4
    assert all(side == sides[0] for side in sides)


def test_equal_images_are_on_one_side_whatever_else_is_in_the_source(tmp_path: Path) -> None:
    rows(np.concatenate([PIXELS, PIXELS]), np.concatenate([LABELS, LABELS])).save_to_disk(tmp_path / "twice")
    rows(PIXELS[10:], LABELS[10:]).save_to_disk(tmp_path / "fewer")
    twice, fewer = (module(tmp_path / name, tmp_path) for name in ("twice", "fewer"))
    assert twice.train_set is not None
    assert content(twice.train_set).keys().isdisjoint(content(twice.validation_set))
    assert len(twice.train_set) == 2 * len(content(twice.train_set))
    assert content(fewer.validation_set).keys() <= content(twice.validation_set).keys()


def test_a_validation_split_validates_and_all_of_the_other_trains(tmp_path: Path) -> None:
    data = module(write_sources(tmp_path)["splits"], tmp_path, validation_split="rest")
    assert data.train_set is not None
    assert len(data.train_set) == 60
    assert list(content(data.validation_set)) == [image.tobytes() for image in PIXELS[:8]]


def test_images_become_square_colour_images_of_the_size(tmp_path: Path) -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = (10, 200, 30)  # the central square
    grey = np.full((16, 16), 77, np.uint8)
    folder = tmp_path / "mixed"
    for name, array in [("wide/a", wide), ("grey/a", grey)]:
        (folder / name).parent.mkdir(parents=True)
        image_files.fromarray(array).save(folder / f"{name}.png")
    write_folder(folder)
    data = module(folder, tmp_path, size=8)
    found = {**content(data.train_set), **content(data.validation_set)}
    assert bytes([10, 200, 30]) * 64 in found
    assert found[bytes([77]) * 192] == 3  # ant, bee, cow, grey, wide
    assert data.classes == 5


def test_max_images_draws_from_every_class(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "files")
    one, two = (module(source, tmp_path, max_images=30) for _ in range(2))
    found = {**content(one.train_set), **content(one.validation_set)}
    assert len(found) == 30
    assert set(found.values()) == {0, 1, 2}
    assert found == {**content(two.train_set), **content(two.validation_set)}


@pytest.mark.parametrize("source", ["generated", "saved"])
def test_batches_are_reproducible_follow_the_seed_and_cover_the_set(source: str, tmp_path: Path) -> None:
    path = None if source == "generated" else write_sources(tmp_path)["saved"]

    def epoch(seed: int) -> list[dict[str, Tensor]]:
        return list(module(path, tmp_path, seed=seed, max_images=60).train_dataloader())

    first, again, other = epoch(0), epoch(0), epoch(1)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in ("image", "label"))
    assert not all(torch.equal(a["image"], b["image"]) for a, b in zip(first, other, strict=False))
    assert {(batch["image"].dtype, *batch["image"].shape) for batch in first} == {(torch.uint8, 4, 3, 16, 16)}
    assert {(batch["label"].dtype, *batch["label"].shape) for batch in first} == {(torch.int64, 4)}
    data = module(path, tmp_path, max_images=60)
    expected = content(data.train_set)
    seen = {
        image.permute(1, 2, 0).numpy().tobytes(): int(label)
        for batch in first
        for image, label in zip(batch["image"], batch["label"], strict=True)
    }
    assert len(seen) == 4 * len(first) == len(expected) // 4 * 4
    assert seen.items() <= expected.items()
    assert data.validation_set is not None
    assert sum(len(batch["label"]) for batch in data.val_dataloader()) == len(data.validation_set)


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_changes_the_memory_alone(channels_last: bool, tmp_path: Path) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    data = module(None, tmp_path, max_images=60, channels_last=channels_last)
    plain = module(None, tmp_path, max_images=60)
    for loader, other in ((data.train_dataloader(), plain.train_dataloader()), (data.val_dataloader(),) * 2):
        for batch, expected in zip(loader, other, strict=True):
            assert batch["image"].is_contiguous(memory_format=layout)
            assert torch.equal(batch["image"], expected["image"])


def test_a_loader_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    data = module(None, tmp_path, max_images=80)
    whole: Any = data.train_dataloader()
    resumed: Any = module(None, tmp_path, max_images=80).train_dataloader()
    batches = iter(whole)
    for _ in range(3):
        next(batches)
    resumed.load_state_dict(whole.state_dict())
    rest, found = list(batches), list(resumed)
    assert len(rest) == len(found) == len(whole) - 3
    assert all(torch.equal(a[key], b[key]) for a, b in zip(rest, found, strict=True) for key in a)


def test_generated_images_depend_on_seed_number_and_size_alone() -> None:
    images, labels = generate_images(1100, seed=3, size=16)
    fewer, _ = generate_images(20, seed=3, size=16)
    other, _ = generate_images(20, seed=-4, size=16)
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (1100, 16, 16, 3), np.int64)
    assert np.array_equal(images[:20], fewer)
    assert not any(np.array_equal(a, b) for a, b in zip(fewer, other, strict=True))
    assert len({image.tobytes() for image in images}) == 1100
    assert np.bincount(labels).tolist() == [110] * len(CLASSES)


def test_generated_classes_differ_and_images_of_a_class_vary() -> None:
    images, labels = generate_images(500, seed=0)
    assert 0.4 < images.mean() / 255 < 0.6
    grey = np.abs(images.mean(-1) - images.mean((1, 2, 3))[:, None, None])  # position jitter keeps shapes near
    means = np.stack([grey[labels == label].mean(0) for label in range(10)])
    assert all(np.abs(means[a] - means[b]).max() > 3 for a in range(10) for b in range(a))
    assert all(images[labels == label].std(0).mean() > 20 for label in range(10))


def test_generated_sides_share_no_image_and_keep_every_class(tmp_path: Path) -> None:
    data = ImageDataModule(max_images=600, batch_size=8)
    data.setup("fit")
    train, validation = content(data.train_set), content(data.validation_set)
    assert train.keys().isdisjoint(validation)
    assert len(train) + len(validation) == 600
    assert 0.05 < len(validation) / 600 < 0.15
    assert set(train.values()) == set(validation.values()) == set(range(10))
    assert data.classes == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "saved", "batch_size": 999}, "has [0-9]+ training images: at least 999 is needed"),
        ({"source": "none"}, "has no rows: pass a dataset with images"),
        ({"source": "saved", "validation_fraction": 1e-9}, "has 0 validation images: at least 1 is needed"),
        ({"source": "saved", "image_column": "picture"}, "image_column is 'picture': the source has"),
        ({"source": "saved", "image_column": "label"}, "image_column 'label' holds ClassLabel: it must hold Image"),
        ({"source": "saved", "label_column": "kind"}, "label_column is 'kind': the source has"),
        ({"source": "strings"}, "label_column 'label' holds string: it must hold class numbers"),
        ({"source": "unlabelled"}, "the label in row 2 is -1: class numbers start at 0"),
        ({"source": "gaps"}, "the label in row 1 is None"),
        ({"source": "no image"}, "row 1 holds no image"),
        ({"source": "deep"}, "row 0 holds an image of mode 'I;16'"),
        ({"source": "broken"}, "the image in row [0-9]+ cannot be decoded"),
        ({"source": "flat"}, "label_column is 'label'.*one folder a class"),
        ({"source": "one class"}, "training images of 1 class: a classifier needs 2"),
        ({"source": "empty"}, "holds no image"),
        ({"source": "a.txt"}, "is a file: pass a folder"),
        ({"source": "splits", "split": "tset"}, r"split is 'tset': .* has \['rest', 'train'\]"),
        ({"source": "splits", "validation_split": "tset"}, "split is 'tset'"),
        ({"source": "renamed", "validation_split": "rest"}, "both must have the same"),
        ({"source": "saved", "validation_split": "train"}, "validation_split is 'train'"),
        ({"source": "saved", "validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"source": "saved", "size": 4}, "size is 4"),
        ({"source": "saved", "batch_size": 0}, "batch_size 0"),
        ({"source": "saved", "max_images": 0}, "max_images is 0"),
    ],
)
def test_a_wrong_value_is_one_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    source = tmp_path / options.pop("source")
    make_wrong(source)
    with pytest.raises(ValueError, match=words) as caught:
        module(source, tmp_path, **options)
    assert "\n" not in str(caught.value)


def make_wrong(source: Path) -> None:
    few, labels = PIXELS[:8], LABELS[:8]
    if source.name == "saved":
        rows().save_to_disk(source)
    elif source.name == "none":
        rows().select([]).save_to_disk(source)
    elif source.name in ("splits", "renamed"):
        names = NAMES if source.name == "splits" else ["x", "y", "z"]
        datasets.DatasetDict({"train": rows(), "rest": rows(few, labels, names)}).save_to_disk(source)
    elif source.name == "strings":
        rows(names=None).cast_column("label", datasets.Value("string")).save_to_disk(source)
    elif source.name in ("unlabelled", "gaps"):
        wrong = {"unlabelled": [0, 1, -1], "gaps": [0, None, 1]}[source.name]
        rows(PIXELS[:3], wrong, None).save_to_disk(source)
    elif source.name == "no image":
        images = [image_files.fromarray(PIXELS[0]), None]
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        datasets.Dataset.from_dict({"image": images, "label": [0, 1]}, features=features).save_to_disk(source)
    elif source.name == "deep":
        rows(np.zeros((2, 16, 16), np.uint16), [0, 1]).save_to_disk(source)
    elif source.name == "broken":
        (write_folder(source) / "bee" / "30.png").write_bytes(b"no image")
    elif source.name == "flat":
        source.mkdir()
        image_files.fromarray(PIXELS[0]).save(source / "a.png")
    elif source.name == "one class":
        rows(labels=[1] * 60).save_to_disk(source)
    elif source.name == "empty":
        source.mkdir()
    else:
        source.write_text("text")


def test_missing_datasets_is_answered_by_the_command_but_generated_images_need_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert module(None, tmp_path, max_images=60).classes == 10
    with pytest.raises(ImportError, match=r'ImageDataModule needs datasets: pip install "sparsetrain\[recipes\]"'):
        module(tmp_path, tmp_path)


def test_a_hub_id_without_a_network_names_id_local_choices_and_switch() -> None:
    with pytest.raises(FileNotFoundError) as error:
        ImageDataModule("someone/some-images").setup("fit")
    words = ("'someone/some-images'", "a folder, a saved dataset", "HF_HUB_OFFLINE")
    assert all(word in str(error.value) for word in words)
