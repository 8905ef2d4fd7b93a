"""What a source of text consists of: its files, and its rows as ``datasets`` reads them."""

import os
import sysconfig
import zlib
from pathlib import Path
from typing import Any

from sparsetrain.hardware.extras import require

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
    files = [file for file in files if os.access(file, os.R_OK)]
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
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
    files = [file for file in found if file.is_file()]
    kinds = {FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"source {str(path)!r} holds {'several formats' if kinds else 'no text file'}: "
            f"allowed are {', '.join(FORMATS)}, one kind at a time."
        )
    return [str(file) for file in files]


def text_rows(
    source: str | None,
    split: str = "train",
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
    num_proc: int | None = None,
) -> Any:
    """Return the rows of a source: a ``datasets.Dataset``, or with ``streaming`` an ``IterableDataset``.

    Args:
        source: A local file or folder, a dataset saved with ``save_to_disk``, the id of a dataset on the hub, or None
            for the Python sources of the running interpreter's standard library.
        split: Which split of a hub dataset, or of several that were saved together.
        streaming: Read while iterating, instead of all before.
        cache_dir: Where ``datasets`` keeps its cache; None is its default.
        num_proc: Processes that read; None, and a stream, work in this one.

    Raises:
        ValueError: If there is no such split, or no text.
        ImportError: If ``datasets`` is not installed.
        FileNotFoundError: If the source is neither a path nor reachable on the hub.

    Example:
        >>> "import" in next(iter(text_rows(None, streaming=True)))["text"]
        True
    """
    datasets = require("datasets", "recipes", "reading text")
    datasets.disable_progress_bars()
    path = None if source is None else Path(source).expanduser()
    if path is not None and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"split is {split!r}: source {str(path)!r} has {sorted(saved)}.")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    options: dict[str, Any] = {"cache_dir": cache_dir, "streaming": streaming}
    if path is None or path.exists():
        files = python_sources() if path is None else text_files(path)
        kind = FORMATS[Path(files[0]).suffix]
        extra = {"sample_by": "document", "encoding_errors": "replace"} if kind == "text" else {}
        processes = None if streaming else num_proc and min(num_proc, len(files))
        return datasets.load_dataset(kind, data_files=files, split="train", num_proc=processes, **options, **extra)
    try:
        return datasets.load_dataset(source, split=split, num_proc=None if streaming else num_proc, **options)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"source {source!r} is no local path and could not be read from the hub: pass a file, a folder, a "
            "saved dataset, or None for the offline default, and unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE "
            "to allow downloads."
        ) from error
