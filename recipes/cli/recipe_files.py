"""The recipes that come with the package."""

from pathlib import Path


def recipe_files() -> dict[str, Path]:
    """Return the recipes that come with the package: file name to path."""
    return {path.name: path for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """Return the path of a recipe given as a path, or as the name of one that comes with the package.

    Raises:
        FileNotFoundError: If there is neither.
    """
    if Path(name).is_file():
        return name
    shipped = recipe_files()
    for candidate in (name, f"{name}.yaml"):
        if candidate in shipped:
            return str(shipped[candidate])
    raise FileNotFoundError(f"config {name!r} is no file and no recipe: pass a path, or one of {', '.join(shipped)}.")
