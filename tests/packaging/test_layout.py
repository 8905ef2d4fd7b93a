import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("kernels", "callbacks", "recipes")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_python() -> set[str]:
    found = set()
    for floor in ("sparsetrain", *FLOORS):
        prefix = "sparsetrain" if floor == "sparsetrain" else f"sparsetrain.{floor}"
        for path in (ROOT / floor).rglob("*.py"):
            parts = path.parent.relative_to(ROOT / floor).parts
            if not (floor == "sparsetrain" and parts and parts[0] in FLOORS):
                found.add(".".join([prefix, *parts]))
    return found | {"sparsetrain.kernels"}


def test_the_links_are_links_to_the_real_folders() -> None:
    for floor in FLOORS:
        link = ROOT / "sparsetrain" / floor
        assert link.is_symlink()
        assert link.resolve() == ROOT / floor
        assert not link.readlink().is_absolute()


def test_kernels_never_shadows_the_hub_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_folder_with_python_is_shipped() -> None:
    setuptools = SETTINGS["tool"]["setuptools"]
    assert set(setuptools["packages"]) == folders_with_python()
    assert setuptools["package-dir"] == {
        "sparsetrain": "sparsetrain",
        **{f"sparsetrain.{floor}": floor for floor in FLOORS},
    }


ABOVE = {
    "kernels": {"lightning", "callbacks", "recipes", "wandb", "datasets", "sparsetrain"},
    "sparsetrain": {"lightning", "datasets", "wandb", "callbacks", "recipes"},
    "callbacks": {"recipes", "datasets"},
}


@pytest.mark.parametrize("floor", ABOVE)
def test_a_floor_imports_floors_below_alone(floor: str) -> None:
    for path in (ROOT / floor).rglob("*.py"):
        if floor == "sparsetrain" and path.relative_to(ROOT / floor).parts[0] in FLOORS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                parts = module.split(".")
                names = {parts[0]} | ({parts[1]} if parts[0] == "sparsetrain" and len(parts) > 1 else set())
                assert not names & ABOVE[floor], f"{path.relative_to(ROOT)} imports {module}"
                if floor == "kernels":
                    assert parts[0] in {"torch", "triton"} | sys.stdlib_module_names, f"{path.name} imports {module}"


def test_no_file_is_longer_than_600_lines() -> None:
    for floor in ("sparsetrain", *FLOORS, "tests", "scripts"):
        for path in (ROOT / floor).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 600, path


def test_the_commands_are_executable() -> None:
    for name in ("scripts/demo", "scripts/test", "scripts/bench", ".ci/run"):
        assert (ROOT / name).stat().st_mode & 0o111, name
