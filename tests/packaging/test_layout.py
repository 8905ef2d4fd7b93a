import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("kernels", "callbacks", "recipes")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_to_ship() -> set[str]:
    found = set()
    for floor in ("sparsetrain", *FLOORS):
        prefix = "sparsetrain" if floor == "sparsetrain" else f"sparsetrain.{floor}"
        for path in (ROOT / floor).rglob("*"):
            parts = path.parent.relative_to(ROOT / floor).parts
            if path.suffix in (".py", ".yaml") and not (floor == "sparsetrain" and parts and parts[0] in FLOORS):
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


def test_every_folder_with_python_or_yaml_is_shipped() -> None:
    setuptools = SETTINGS["tool"]["setuptools"]
    assert set(setuptools["packages"]) == folders_to_ship()
    assert setuptools["package-dir"] == {
        "sparsetrain": "sparsetrain",
        **{f"sparsetrain.{floor}": floor for floor in FLOORS},
    }


BOTTOM_UP = ("kernels", "sparsetrain", "callbacks", "recipes")
HEAVY = {
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "datasets",
    "wandb",
    "transformers",
    "peft",
    "accelerate",
}
FORBIDDEN = {"kernels": HEAVY, "sparsetrain": HEAVY, "callbacks": {"datasets"}, "recipes": set[str]()}


def imports(source: str, package: str) -> list[tuple[str, bool]]:
    """Return every imported name in full, and whether the import was relative; ``package`` holds the module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            found += [(".".join([*module, alias.name]), node.level > 0) for alias in node.names]
    return found


def floor_of(name: str) -> str:
    second = [*name.split("."), ""][1]
    return second if second in FLOORS else "sparsetrain"


def complaint(name: str, relative: bool, floor: str) -> str | None:
    """Return what is wrong with an import in a module of ``floor``, or None."""
    top = name.split(".")[0]
    if top != "sparsetrain":
        if floor == "kernels" and top not in {"torch", "triton"} | sys.stdlib_module_names:
            return f"{floor} imports {name}: only torch, triton and the standard library are allowed"
        return f"{floor} imports {name}" if top in FORBIDDEN[floor] else None
    if BOTTOM_UP.index(floor_of(name)) > BOTTOM_UP.index(floor):
        return f"{floor} imports {name}, which is a floor above"
    if floor != "kernels" and floor_of(name) == "kernels" and "reference" in name.split("."):
        return f"{floor} imports {name}: a definition is for tests, so import from the package of the operation"
    if floor_of(name) == floor and not relative:
        return f"{floor} imports {name} of its own floor absolutely: use a relative import"
    return None


@pytest.mark.parametrize("floor", BOTTOM_UP)
def test_a_floor_imports_floors_below_alone(floor: str) -> None:
    prefix = "sparsetrain" if floor == "sparsetrain" else f"sparsetrain.{floor}"
    for path in (ROOT / floor).rglob("*.py"):
        parts = path.parent.relative_to(ROOT / floor).parts
        if floor == "sparsetrain" and parts and parts[0] in FLOORS:
            continue
        for name, relative in imports(path.read_text(), ".".join([prefix, *parts])):
            wrong = complaint(name, relative, floor)
            assert wrong is None, f"{path.relative_to(ROOT)}: {wrong}"


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("from .callbacks import SparseTrainingCallback", "sparsetrain"),
        ("from sparsetrain import recipes", "sparsetrain"),
        ("from ..recipes.gpt import GPTModule", "sparsetrain.callbacks"),
        ("from ...masks import nm_mask", "sparsetrain.kernels.tile_codes"),
        ("from ..kernels.tile_codes.reference import unpack_codes", "sparsetrain.masks"),
        ("import sparsetrain", "sparsetrain.kernels.tile_codes"),
        ("import numpy", "sparsetrain.kernels.tile_codes"),
        ("import lightning.pytorch", "sparsetrain"),
        ("from sparsetrain.recipes.gpt import GPTModule", "sparsetrain.recipes.demo"),
    ],
)
def test_an_import_of_a_floor_above_is_noticed(line: str, package: str) -> None:
    ((name, relative),) = imports(line, package)
    assert complaint(name, relative, floor_of(package))


def test_no_private_sparse_python_of_torch_is_used() -> None:
    for floor in ("sparsetrain", *FLOORS, "scripts"):
        for path in (ROOT / floor).rglob("*.py"):
            assert "torch.sparse" not in path.read_text(), f"{path}: its Python changes with every release"


def test_the_commands_are_executable() -> None:
    scripts = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.read_text().startswith("#!")]
    assert {path.name for path in scripts} >= {"bench", "demo", "test"}
    for path in [*scripts, ROOT / ".ci" / "run"]:
        assert path.stat().st_mode & 0o111, path.name
