import doctest
import importlib
import re
from pathlib import Path

import pytest

import sparsetrain

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


def test_a_missing_extra_is_one_sentence_with_the_command() -> None:
    from sparsetrain.hardware.extras import require

    with pytest.raises(ImportError, match=r'the plot needs no_such_module: pip install "sparsetrain\[recipes\]"'):
        require("no_such_module", "recipes", "the plot")
