import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.recipes.data import TextDataModule
from sparsetrain.recipes.data.documents import Blocks, split_documents
from sparsetrain.recipes.data.sources import python_sources

datasets = pytest.importorskip("datasets")

DOCUMENTS = [f"document {number}: " + f"<{number}>" * 20 for number in range(200)]


def module(source: Path | None, tmp_path: Path, **options: Any) -> TextDataModule:
    options = {"context": 7, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), **options}
    data = TextDataModule(None if source is None else str(source), **options)
    data.setup("fit")
    return data


def content(blocks: Blocks | None) -> bytes:
    assert blocks is not None
    return blocks.blocks.numpy().tobytes()


def packed(documents: list[str], **options: Any) -> tuple[bytes, bytes]:
    rows = datasets.Dataset.from_dict({"text": documents})
    train, validation = split_documents(rows, options.pop("fraction", 0.2), **options)
    return train.numpy().tobytes(), validation.numpy().tobytes()


def write_sources(folder: Path) -> dict[str, Path]:
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    paths = {name: folder / name for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "files", "saved", "splits")}
    rows.to_csv(paths["a.csv"])
    rows.to_json(paths["a.jsonl"])
    paths["a.json"].write_text(json.dumps([{"text": text} for text in DOCUMENTS]))
    rows.to_parquet(paths["a.parquet"])
    paths["files"].mkdir()
    for number, text in enumerate(DOCUMENTS):
        (paths["files"] / f"{number:03}.md").write_text(text)
    rows.save_to_disk(paths["saved"])
    datasets.DatasetDict({"train": rows, "rest": rows.select([0])}).save_to_disk(paths["splits"])
    return paths


def test_every_kind_of_source_gives_the_same_blocks(tmp_path: Path) -> None:
    contents = {}
    for name, path in write_sources(tmp_path).items():
        data = module(path, tmp_path)
        contents[name] = content(data.train_blocks), content(data.validation_set)
    assert len(contents) == 7
    assert len(set(contents.values())) == 1
    train, validation = contents["a.csv"]
    assert len(train) + len(validation) > 0.99 * sum(len(text) + 1 for text in DOCUMENTS)


def test_documents_go_to_one_side_whatever_else_is_in_the_source() -> None:
    train, validation = (side.decode().splitlines() for side in packed(DOCUMENTS))
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert set(train).isdisjoint(validation)
    assert 0.1 < len(validation) / len(DOCUMENTS) < 0.3
    assert train == [text for text in DOCUMENTS if text in set(train)]  # in the source's order
    fewer = packed(DOCUMENTS[50:])[1].decode().splitlines()
    assert fewer == [text for text in validation if text in set(DOCUMENTS[50:])]


def test_a_single_document_is_cut_in_two() -> None:
    text = "0123456789" * 10
    train, validation = packed([text], fraction=0.25)
    assert (train + validation).decode() == text + "\n"
    assert len(validation) == 26


@pytest.mark.parametrize("limit", [1, 100, 8_000, 10**9])
def test_max_bytes_keeps_the_beginning_of_the_text(limit: int) -> None:
    expected, left = [], limit
    for text in DOCUMENTS:
        expected.append(text[:left])
        left -= len(expected[-1])
        if not left:
            break
    got = b"".join(packed(DOCUMENTS, max_bytes=limit)).decode().splitlines()
    assert sorted(got) == sorted(expected)


def test_missing_and_broken_texts_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    assert b"".join(packed(["é", None, "", "é"])) == "é\né\n".encode()  # type: ignore[list-item]
    (tmp_path / "a.txt").write_bytes(b"ok \xff\xfe ok\n" * 50)
    assert content(module(tmp_path / "a.txt", tmp_path).train_blocks).startswith("ok \ufffd\ufffd ok".encode())


def test_several_processes_encode_the_same_bytes(tmp_path: Path) -> None:
    source = write_sources(tmp_path)["files"]
    one, two = module(source, tmp_path), module(source, tmp_path, num_proc=2, cache_dir=str(tmp_path / "other"))
    assert content(one.train_blocks) == content(two.train_blocks)
    assert content(one.validation_set) == content(two.validation_set)


@pytest.mark.parametrize("name", ["a.jsonl", "saved"])
def test_a_second_start_reads_the_cache(tmp_path: Path, name: str) -> None:
    source = write_sources(tmp_path)[name]

    def cached() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cache-*.arrow")}

    first = module(source, tmp_path)
    before = cached()
    assert len(before) == 1
    second = module(source, tmp_path)
    assert cached() == before
    assert content(first.train_blocks) == content(second.train_blocks)
    module(source, tmp_path, validation_fraction=0.5)
    assert len(cached()) == 2  # another split is another entry


def test_a_saved_dataset_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_sources(tmp_path)["saved"]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert len(content(module(source, tmp_path).train_blocks)) > 10_000
    assert not list(tmp_path.rglob("cache-*.arrow"))


def test_training_batches_are_reproducible_and_follow_the_seed(tmp_path: Path) -> None:
    source = write_sources(tmp_path)["a.jsonl"]
    loaders = [module(source, tmp_path, seed=seed).train_dataloader() for seed in (0, 0, 1)]
    first, again, other = (torch.stack(list(loader)) for loader in loaders)
    assert (first.dtype, first.shape[1:]) == (torch.uint8, (2, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    data = module(source, tmp_path)
    assert b"".join(batch.numpy().tobytes() for batch in data.val_dataloader()) == content(data.validation_set)


def test_the_offline_default_is_large_ordered_and_leaves_tests_out() -> None:
    files = python_sources()
    assert files == python_sources()
    assert sum(os.path.getsize(file) for file in files) > 8_000_000
    root = sysconfig.get_path("stdlib")
    assert not [
        file for file in files if {"test", "tests", "site-packages"} & set(os.path.relpath(file, root).split("/"))
    ]


def test_unreadable_sources_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "open.py").write_text("x = 1\n")
    (tmp_path / "closed.py").write_text("x = 2\n")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "closed" not in str(path) and access(path, mode))
    assert python_sources() == [str(tmp_path / "open.py")]
    (tmp_path / "open.py").unlink()
    with pytest.raises(FileNotFoundError, match="pass source= a text file or folder"):
        python_sources()


def test_the_offline_default_is_python_and_reproducible(tmp_path: Path) -> None:
    one, two = module(None, tmp_path, max_bytes=400_000), module(None, tmp_path, max_bytes=400_000)
    assert content(one.train_blocks) == content(two.train_blocks)
    assert content(one.train_blocks).count(b"import ") > 50
    share = len(content(one.validation_set)) / 400_000
    assert 0 < share < 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "short.txt"}, "a batch needs 2"),
        ({"source": "a.jsonl", "text_column": "body"}, "text_column is 'body'"),
        ({"source": "."}, "several formats"),
        ({"source": "empty"}, "no text file"),
        ({"source": "a.csv", "validation_fraction": 2.0}, "validation_fraction is 2.0"),
        ({"source": "splits", "split": "tset"}, r"split is 'tset': .* has \['rest', 'train'\]"),
        ({"source": "numbers.jsonl"}, "text_column 'text' holds int64: it must hold strings"),
        ({"source": "a.csv", "max_bytes": 0}, "max_bytes is 0"),
        ({"source": "a.csv", "num_proc": 0}, "num_proc is 0"),
        ({"source": "a.csv", "validation_blocks": -1}, "validation_blocks is -1"),
        ({"source": "a.csv", "context": 0}, "context is 0"),
    ],
)
def test_a_wrong_value_is_one_sentence(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    write_sources(tmp_path)
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n')
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    source = tmp_path / options.pop("source")
    with pytest.raises(ValueError, match=words) as caught:
        module(source, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_missing_datasets_is_answered_by_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'reading text needs datasets: pip install "sparsetrain\[recipes\]"'):
        TextDataModule().setup("fit")


def test_a_hub_id_without_a_network_names_id_local_choices_and_switch() -> None:
    with pytest.raises(FileNotFoundError) as error:
        TextDataModule("someone/some-text").setup("fit")
    words = ("'someone/some-text'", "a file, a folder, a saved dataset", "HF_HUB_OFFLINE")
    assert all(word in str(error.value) for word in words)
