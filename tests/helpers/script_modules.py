"""Modules of ``scripts/``: imported by their plain names, as the scripts do, and forgotten afterwards."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
BENCHMARKS, GPU = SCRIPTS / "benchmarks", SCRIPTS / "gpu"


@contextmanager
def importable(*folders: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Their names are not for others: ``main`` and ``step`` could be anybody's."""
    names = {path.stem for folder in folders for path in folder.glob("*.py")}
    path, before = list(sys.path), {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path[:0] = map(str, folders)
    try:
        yield importlib.import_module
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
