from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support import Regression

from sparsetrain.recipes.data import ResumableLoader, TextDataModule
from sparsetrain.recipes.data.text import Blocks

TEXT = "".join(f"line {number} of some text\n" for number in range(2000))


def module(source: str | Path | None, tmp_path: Path, **options) -> TextDataModule:
    data = TextDataModule(
        None if source is None else str(source), context=15, batch_size=4, cache_dir=str(tmp_path / "cache"), **options
    )
    data.setup("fit")
    return data


def joined(blocks: Blocks) -> bytes:
    return bytes(blocks.blocks.flatten().tolist())


def test_every_kind_of_source_holds_the_same_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [TEXT]})
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(TEXT)
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("a.txt", "folder", "a.jsonl", "a.parquet", "saved"):
        data = module(tmp_path / name, tmp_path)
        text = joined(data.train_blocks) + joined(data.validation_set)
        assert joined(data.train_blocks).decode() == TEXT[: len(joined(data.train_blocks))], name
        assert len(text) > 0.99 * len(TEXT)
        batch = next(iter(data.train_dataloader()))
        assert (batch.dtype, tuple(batch.shape)) == (torch.uint8, (4, 16))


def test_the_offline_default_is_python_and_its_documents_go_to_one_side(tmp_path: Path) -> None:
    one, two = module(None, tmp_path, max_bytes=400_000), module(None, tmp_path, max_bytes=400_000)
    assert torch.equal(one.train_blocks.blocks, two.train_blocks.blocks)
    assert joined(one.train_blocks).count(b"import ") > 50
    share = len(one.validation_set) / (len(one.train_blocks) + len(one.validation_set))
    assert 0 < share < 0.5
    train_blocks = {bytes(block.tolist()) for block in one.train_blocks.blocks}
    held_out = [bytes(block.tolist()) for block in one.validation_set.blocks]
    assert sum(block in train_blocks for block in held_out) < 0.2 * len(held_out)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"source": "no/such-dataset"}, FileNotFoundError, "'no/such-dataset'"),
        ({"source": "short.txt"}, ValueError, "a batch needs 4"),
        ({"source": "a.jsonl", "text_column": "body"}, ValueError, "text_column is 'body'"),
        ({"source": "mixed"}, ValueError, "several formats"),
        ({"source": "empty"}, ValueError, "no text file"),
        ({"source": None, "validation_fraction": 2.0}, ValueError, "validation_fraction is 2.0"),
    ],
)
def test_a_wrong_source_is_named(tmp_path: Path, monkeypatch, options, error, words) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    Path("a.jsonl").write_text('{"text": "x"}\n')
    Path("mixed").mkdir()
    Path("mixed/a.txt").write_text("x")
    Path("mixed/a.csv").write_text("text\nx\n")
    Path("empty").mkdir()
    source = options.pop("source")
    with pytest.raises(error, match=words) as caught:
        module(source, tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_order_depends_on_seed_and_epoch_alone_and_ranks_share_nothing() -> None:
    blocks = Blocks(torch.arange(240, dtype=torch.uint8), 4)

    def epochs(**options: int) -> list[list[list[int]]]:
        loader = ResumableLoader(blocks, 5, **{"seed": 0, **options})
        return [[batch[:, 0].tolist() for batch in loader] for _ in range(2)]

    first, second = epochs()
    assert epochs() == [first, second]
    assert first != second != epochs(seed=1)[1]
    assert sorted(chain(*first)) == list(range(0, 240, 4))
    ranks = [epochs(rank=rank, world=2)[0] for rank in range(2)]
    assert sorted(chain(*ranks[0], *ranks[1])) == list(range(0, 240, 4))
    assert set(chain(*ranks[0])).isdisjoint(chain(*ranks[1]))


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_a_resumed_run_sees_the_batches_it_had_not_seen(tmp_path: Path, stop: int) -> None:
    class Items(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 48

        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            x = [torch.randn(16, generator=torch.Generator().manual_seed(index)) for index in indices]
            return [torch.stack(x)]

    def run(checkpoint: Path | None = None) -> Regression:
        torch.manual_seed(0)
        model = Regression()
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
        trainer = Trainer(
            max_steps=16, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[saver],
            enable_model_summary=False, default_root_dir=tmp_path, accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(model, ResumableLoader(Items(), 4, seed=0), ckpt_path=checkpoint, weights_only=True)
        return model

    whole = run()
    (path,) = tmp_path.glob(f"*step={stop}.ckpt")  # 12 batches an epoch, so 16 steps cross two epoch borders
    resumed = run(path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
