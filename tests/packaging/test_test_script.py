"""``scripts/test``: what it says, and what it checks beside the tests."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / "test", *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--torch", "1.0"], ["--torch"]])
def test_a_torch_without_pins_is_one_sentence_and_installs_nothing(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip() == (
        f"scripts/test: --torch is '{(*arguments, '')[1]}': only 2.11 has pins, in scripts/constraints-torch-2.11.txt."
    )


def test_the_second_environment_is_explained_and_has_a_triton_of_its_own() -> None:
    assert "--torch VERSION" in run("--help").stdout
    pins = dict(
        line.split("==") for line in (ROOT / "scripts/constraints-torch-2.11.txt").read_text().split() if "==" in line
    )
    assert pins["torch"] == "2.11.0"
    assert pins["triton"] == "3.6.0"
    assert ".venv-*/" in (ROOT / ".gitignore").read_text().split()


def test_tests_and_scripts_are_type_checked_in_every_function() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert settings["strict"]
    assert set(settings["files"]) == {"sparsetrain", "tests", "scripts"}
    for override in settings["overrides"]:
        assert override.get("check_untyped_defs", True)
        assert not override.get("ignore_errors")
        assert not {"call-arg", "call-overload", "list-item"} & set(override.get("disable_error_code", []))
