"""Names of tests are the same in every process: workers of xdist refuse to run tests whose names differ."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}| object at |<function")


def collect(seed: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_no_name_of_this_run_holds_an_address(request: pytest.FixtureRequest) -> None:
    """Of all tests that were collected with this one: the whole suite, where the whole suite runs."""
    found = [item.nodeid for item in request.session.items if ADDRESS.search(item.nodeid)]
    assert not found


@pytest.mark.sweep
def test_another_process_names_the_tests_of_kernels_as_this_one_does(request: pytest.FixtureRequest) -> None:
    """Of the folder that ``scripts/gpu_check`` gives to several workers."""
    mine = {item.nodeid for item in request.session.items if item.nodeid.startswith("tests/kernels/")}
    if not mine:
        pytest.skip("tests/kernels is not part of this run")
    theirs = collect("1" if os.environ.get("PYTHONHASHSEED") != "1" else "2", "-m", "", "tests/kernels")
    assert not mine - set(theirs)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tests/a.py::test_it[<function <lambda> at 0x7f5c]", True),
        ("tests/a.py::test_it[<a.Thing object at 0x7f5c3a2b1c10>]", True),
        ("tests/a.py::test_it[0x7f5c3a2b1c10]", True),
        ("tests/a.py::test_it[torch.float16-64x128]", False),
    ],
    ids=["function", "object", "number", "plain"],
)
def test_a_name_with_an_address_is_noticed(name: str, found: bool) -> None:
    assert bool(ADDRESS.search(name)) == found
