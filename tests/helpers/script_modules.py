"""Modules of the packages in ``scripts/``: fresh ones, so that a test may change them, and forgotten afterwards."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

BENCHMARKS, GPU, REPRODUCTION = "scripts.benchmarks", "scripts.gpu", "scripts.reproduction"


@contextmanager
def importable(*packages: str) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module by its plain name from the first of these packages that has it."""

    def load(name: str) -> ModuleType:
        package = next(package for package in packages if importlib.util.find_spec(f"{package}.{name}"))
        return importlib.import_module(f"{package}.{name}")

    before = _forget()
    try:
        yield load
    finally:
        _forget()
        sys.modules.update(before)


def _forget() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "scripts"}
