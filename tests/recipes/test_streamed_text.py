import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from sparsetrain.recipes.data.streamed import StreamedBlocks

datasets = pytest.importorskip("datasets")

DOCUMENTS = [f"document {number}: " + f"<{number}>" * 5 for number in range(60)]
WHOLE = "".join(f"{text}\n" for text in DOCUMENTS).encode()


def write(path: Path) -> str:
    datasets.Dataset.from_dict({"text": [*DOCUMENTS, None, ""]}).to_parquet(path)
    return str(path)


def read(stream: StreamedBlocks, batches: int) -> bytes:
    return b"".join(batch.numpy().tobytes() for batch in islice(stream, batches))


def test_text_comes_in_its_order_and_begins_again(tmp_path: Path) -> None:
    stream = StreamedBlocks(write(tmp_path / "a.parquet"), context=9, batch_size=2)
    assert read(stream, 3 * len(WHOLE) // 20) == (3 * WHOLE)[: 3 * len(WHOLE) // 20 * 20]


def test_ranks_share_the_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    for rank in (0, 1):
        own = "".join(f"{text}\n" for text in DOCUMENTS[rank::2]).encode()
        assert read(StreamedBlocks(path, context=9, batch_size=1, rank=rank, world=2), 10) == own[:100]


@pytest.mark.parametrize("kind", ["one file", "many files"])
@pytest.mark.parametrize("taken", [(0,), (1,), (7, 1), (2, 3, 200)])
def test_a_resumed_stream_goes_on_behind_the_last_batch(tmp_path: Path, taken: tuple[int, ...], kind: str) -> None:
    path = write(tmp_path / "a.parquet") if kind == "one file" else str(tmp_path)
    for number, text in enumerate(DOCUMENTS[:21] if kind == "many files" else ()):
        (tmp_path / f"{number:02}.md").write_text(text)
    straight, resumed = (StreamedBlocks(path, context=9, batch_size=2, rank=1, world=2) for _ in range(2))
    expected, batches = iter(straight), iter(resumed)
    for count in taken:
        for _ in range(count):
            assert torch.equal(next(expected), next(batches))
        state = json.dumps(resumed.state_dict())
        resumed = StreamedBlocks(path, context=9, batch_size=2, rank=1, world=2)
        resumed.load_state_dict(json.loads(state))
        batches = iter(resumed)
    for _ in range(100):
        assert torch.equal(next(expected), next(batches))


def test_saved_datasets_are_streamed_too(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "rest": rows.select([1])}).save_to_disk(tmp_path / "splits")
    assert read(StreamedBlocks(str(tmp_path / "saved"), context=9, batch_size=1), 10) == WHOLE[:100]
    stream = StreamedBlocks(str(tmp_path / "splits"), split="rest", context=9, batch_size=1)
    assert read(stream, 1) == b"document 1"
    with pytest.raises(ValueError, match=r"split is 'test': source '.*' has \['rest', 'train'\]"):
        StreamedBlocks(str(tmp_path / "splits"), split="test")


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column is 'body': it must name strings, and a row .* has \['text'\]"):
        next(iter(StreamedBlocks(path, text_column="body")))
    with pytest.raises(ValueError, match="has less than a batch for this rank, 1000 blocks of 129 bytes"):
        next(iter(StreamedBlocks(path, batch_size=1000)))
    with pytest.raises(ValueError, match="context is 0 and batch_size 16: both must be at least 1"):
        StreamedBlocks(path, context=0)
