"""The rooms of ``sparsetrain/``: what imports what, and how large anything there may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = (
    {"types", "checks", "hardware", "distributed"},
    {"masks", "backends"},
    {"criteria", "dispatch"},
    {"methods", "matmul"},
    {"layers"},
    {"modifiers", "optim", "checkpoint"},
    {"training"},
)
"""Folders and modules of the package, from the ground up; each imports what is on floors below it."""

TILELANG = "experimental/tilelang"
"""Programs of a TileLang kernel are long there: its compiler takes one function apart."""


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "sparsetrain").parts[0].removesuffix(".py")


def modules() -> Iterator[Path]:
    for entry in (ROOT / "sparsetrain").iterdir():
        if entry.is_dir() and not entry.is_symlink() and entry.name != "__pycache__":
            yield from entry.rglob("*.py")
        elif entry.suffix == ".py" and entry.name != "__init__.py":
            yield entry


def rooms_imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Return the rooms from which a module of ``package`` imports, at its top, in a function or for its types."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = (*base, *(node.module.split(".") if node.module else ()))
            if name[:1] == ("sparsetrain",):
                found |= {name[1]} if len(name) > 1 else {alias.name for alias in node.names}
    return found & set().union(*FLOORS)


def test_every_room_has_its_floor() -> None:
    assert {room_of(path) for path in modules()} == set().union(*FLOORS)
    assert len(set().union(*FLOORS)) <= 15  # and the package's own __init__
    assert len(FLOORS) <= 7


@pytest.mark.parametrize("path", sorted(modules()), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_floors_below_it(path: Path) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    here = room_of(path)
    package = path.relative_to(ROOT).parent.parts
    for room in rooms_imported(path.read_text(), package) - {here}:
        assert floor[room] < floor[here], f"{path.relative_to(ROOT)} imports {room}, which is not below {here}"


@pytest.mark.parametrize(
    ("line", "rooms"),
    [
        ("from ..training.engine import SparseTraining", {"training"}),
        ("from ...training import SparseTraining", set()),
        ("from .. import training, types", {"training", "types"}),
        ("def late():\n    from ..layers.linear import SparseLinear", {"layers"}),
        ("from .linear import SparseLinear", {"layers"}),
    ],
)
def test_imports_are_found_wherever_they_stand(line: str, rooms: set[str]) -> None:
    assert rooms_imported(line, ("sparsetrain", "layers")) == rooms


def length(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Return the lines of a definition without those of its docstring."""
    document = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - len((document or "").splitlines())  # type: ignore[operator]


def is_kernel(path: Path, node: ast.FunctionDef) -> bool:
    if path.is_relative_to(ROOT / "sparsetrain" / "backends" / TILELANG) and node.name in ("blocks", "product"):
        return True
    return any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("folder", ["sparsetrain", "kernels", "callbacks", "recipes", "scripts"])
def test_nothing_is_too_long_to_be_read_at_once(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 250, f"{path}: {node.name}"  # type: ignore[operator]
            elif isinstance(node, ast.FunctionDef) and not is_kernel(path, node):
                assert length(node) <= 40, f"{path}: {node.name}"


def test_no_test_file_has_more_than_400_lines() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
