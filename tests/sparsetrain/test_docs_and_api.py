import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import sparsetrain
from sparsetrain import callbacks

RUNS = ("SparseTrainingCallback", "HuggingFaceSparseTraining", "Method")
"""What documents show how to set up, whole but for what a reader has: calls of these are made."""

ROOT = Path(__file__).resolve().parents[2]


def _modules() -> list[str]:
    found = ["sparsetrain"]
    for folder in ("sparsetrain", "kernels", "callbacks", "recipes"):
        prefix = "sparsetrain" if folder == "sparsetrain" else f"sparsetrain.{folder}"
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "sparsetrain" and relative.parts[0] in ("kernels", "callbacks", "recipes"):
                continue
            parts = [part for part in relative.with_suffix("").parts if part not in ("__init__", "__main__")]
            found.append(".".join([prefix, *parts]))
    return sorted(set(found))


@pytest.mark.parametrize("name", _modules())
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS, verbose=False)
    assert result.failed == 0


def test_every_public_name_is_importable_and_documented() -> None:
    for name in sparsetrain.__all__:
        assert getattr(sparsetrain, name).__doc__, name
    assert set(sparsetrain.__all__) <= set(dir(sparsetrain))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsetrain.nonsense


def test_type_checkers_see_the_lazy_names() -> None:
    source = (ROOT / "sparsetrain" / "__init__.py").read_text()
    block = source[source.index("if TYPE_CHECKING") : source.index("def __getattr__")]
    assert set(re.findall(r" as (\w+)", block)) == set(sparsetrain.__all__)


def test_every_python_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_links_in_the_documents_point_to_files() -> None:
    for document in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("kernels/**/*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def _blocks() -> list[tuple[str, ast.Module]]:
    """Return the python blocks of the documents, each with its document's name."""
    found = []
    for document in sorted(ROOT.glob("docs/**/*.md")):
        for block in re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.S):
            found.append((document.name, ast.parse(block)))
    return found


def test_runs_in_the_documents_can_be_set_up() -> None:
    names = {name: getattr(callbacks, name) for name in callbacks.__all__}
    names |= {name: getattr(sparsetrain, name) for name in sparsetrain.__all__}
    made = 0
    for document, block in _blocks():
        for call in ast.walk(block):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in RUNS:
                continue
            used = {node.id for node in ast.walk(call) if isinstance(node, ast.Name)}
            if used <= names.keys():
                eval(compile(ast.Expression(call), document, "eval"), dict(names))
                made += 1
    assert made >= 15


def test_modules_in_the_documents_are_imported_where_they_are_used() -> None:
    for document, block in _blocks():
        nodes = list(ast.walk(block))
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        imported = {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
        roots = {
            node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert not (roots & {"sparsetrain", "st", "nn"}) - imported, document


def test_dotted_names_in_the_documents_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]:
        for name in re.findall(r"`(sparsetrain(?:\.[A-Za-z_]+)+)[`(]", document.read_text()):
            assert pkgutil.resolve_name(name) is not None, f"{document.name}: {name}"


def test_a_missing_extra_is_one_sentence_with_the_command() -> None:
    from sparsetrain.hardware.extras import require

    with pytest.raises(ImportError, match=r'the plot needs no_such_module: pip install "sparsetrain\[recipes\]"'):
        require("no_such_module", "recipes", "the plot")
