"""The recipes that come with the package, and those of the user."""

from collections.abc import Sequence
from pathlib import Path

from sparsetrain.checks.suggestions import did_you_mean


def recipe_files() -> dict[str, Path]:
    """Return the recipes that come with the package: file name to path."""
    return {path.name: path for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """Return the path of a recipe given as a path, or as the name of one that comes with the package.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If the file holds no mapping in YAML.
    """
    if Path(name).is_file():
        _require_mapping(name)
        return name
    shipped = recipe_files()
    for candidate in (name, f"{name}.yaml"):
        if candidate in shipped:
            return str(shipped[candidate])
    if Path(name).is_dir():
        raise ValueError(f"config {name!r} is a folder: pass the path of a file, or one of {', '.join(shipped)}.")
    folder, asked = Path(name).parent, Path(name).name
    beside = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = did_you_mean(asked, [*shipped, *beside]) or did_you_mean(f"{asked}.yaml", shipped)
    raise FileNotFoundError(
        f"config {name!r} is no file and no recipe{near}: pass a path, or one of {', '.join(shipped)}."
    )


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """Replace the names of recipes after ``--config`` and ``-c`` by their paths."""
    resolved = []
    expects_name = False
    for argument in arguments:
        key, equals, name = argument.partition("=")
        if expects_name:
            resolved.append(find_recipe(argument))
        elif key == "--config" and equals:
            resolved.append(f"--config={find_recipe(name)}")
        else:
            resolved.append(argument)
        expects_name = argument in ("--config", "-c")
    return resolved


def _require_mapping(path: str) -> None:
    import yaml

    try:
        content = yaml.compose(Path(path).read_bytes(), yaml.SafeLoader)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ValueError(f"config {path!r} cannot be read ({error.strerror}): check its permissions.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"config {path!r} is no YAML{place}: {error.problem or error.context}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"config {path!r} is no YAML: it holds bytes that are no text.") from None
    if not isinstance(content, yaml.MappingNode):
        found = "is empty" if content is None else "holds no keys"
        raise ValueError(f"config {path!r} {found}: it must have keys such as model, data and trainer.")
