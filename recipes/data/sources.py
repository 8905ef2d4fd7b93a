"""Which files a source of text consists of."""

import os
import sysconfig
import zlib
from pathlib import Path

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
