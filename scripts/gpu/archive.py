"""One tar for each part: what it wrote, what the library learned, and the summary."""

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

LARGEST_FILE = 4 << 20  # tables of orders of large weights follow from those of small ones


def pack(out: Path, name: str, folders: Iterable[str]) -> tuple[Path, list[str]]:
    """Write ``out/name.tar.gz``; another process sees the whole file or the one before.

    Args:
        out: The folder of all results.
        name: Of the part.
        folders: What is packed beside ``summary.json``, relative to ``out``.

    Returns:
        The file, and what was left out because it is larger than ``LARGEST_FILE``.
    """
    path, left_out = out / f"{name}.tar.gz", []
    temporary = path.with_suffix(".tmp")
    files = [out / "summary.json", *(file for folder in folders for file in sorted((out / folder).rglob("*")))]
    with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        for file in files:
            if not file.is_file():
                continue
            inside = file.relative_to(out).as_posix()
            if file.stat().st_size > LARGEST_FILE:
                left_out.append(inside)
            else:
                tar.add(file, f"{name}/{inside}")
    os.replace(temporary, path)
    return path, left_out
