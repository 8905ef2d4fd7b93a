"""Compile kernels for GPUs that are not here and count what the machine code uses.

``python tests/helpers/compile_only.py 80,90 mask_search`` prints, as JSON, the figures of every case of a file in
``compile_cases`` by compute capability; ``--record`` compiles everything and writes the budgets that the tests hold it
to, for the version of Triton that runs: ``compile_cases/budgets-3.7.json``.
"""

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CAPABILITIES = (80, 89, 90, 100, 120)


def triton_version() -> tuple[int, int]:
    """Return the version of Triton that is installed, without importing it."""
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def recorded(folder: Path = FOLDER / "compile_cases") -> dict[tuple[int, int], Path]:
    """Return the files of budgets by the version of Triton that they were recorded with, the oldest first."""
    versions = (path.stem.removeprefix("budgets-").split(".") for path in folder.glob("budgets-*.json"))
    found = sorted((int(major), int(minor)) for major, minor in versions)
    return {version: folder / f"budgets-{version[0]}.{version[1]}.json" for version in found}


def budgets_of(version: tuple[int, int], records: dict[tuple[int, int], Path]) -> tuple[dict[str, Any], str]:
    """Return the budgets that hold for a version of Triton, and what is to be said of them if they are not its own.

    A version without a record has the newest that is older than it; one older than all has the oldest.
    """
    older = [known for known in records if known <= version]
    chosen = max(older) if older else min(records)
    budgets: dict[str, Any] = json.loads(records[chosen].read_text())
    mine, theirs = (".".join(map(str, numbers)) for numbers in (version, chosen))
    said = f"Triton {mine} has no budgets of its own: those of {theirs} hold, so record some." if mine != theirs else ""
    return budgets, said


@dataclass(frozen=True)
class Case:
    """A kernel with the types and constants of one launch.

    ``signature`` lists the arguments in order; a constexpr argument has its value in ``constants``. ``aligned`` names
    the arguments that are multiples of 16. ``elements`` of the input are handled by one program.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    elements: int
    warps: int = 4
    aligned: tuple[str, ...] = ()
    vector_bits: int = 128  # widest load that must be present
    options: dict[str, Any] = field(default_factory=dict)


def figures(case: Case, capability: int) -> dict[str, float]:
    """Compile a case and return its registers, spills, shared bytes, instructions per element and widest load."""
    import triton
    import triton.backends.nvidia as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.signature)
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature,
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.warps, "enable_fp_fusion": False, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert match is not None, usage.stdout
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", sass, re.MULTILINE)
    code = [line for line in lines if not line.startswith("NOP")]
    loads = [load for line in code for load in re.findall(r"\bLDG\.E[.\w]*", line)]
    widths = [int(width[1]) if (width := re.search(r"\.(64|128)\b", load)) else 32 for load in loads]
    return {
        "registers": int(match[1]),
        "local_bytes": int(match[2]) + int(match[3]),
        "spills": sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in code),
        "shared_bytes": compiled.metadata.shared,
        "instructions_per_element": round(len(code) * 32 * case.warps / case.elements, 2),
        "widest_load_bits": max(widths, default=0),
        "vector_bits": case.vector_bits,
    }


def cases(name: str) -> list[Case]:
    """Return the cases of one file."""
    found: list[Case] = importlib.import_module(f"compile_cases.{name}").CASES
    return found


def names() -> list[str]:
    """Return the files with cases."""
    return sorted(path.stem for path in (FOLDER / "compile_cases").glob("*.py"))


def run(name: str, capabilities: Sequence[int] = CAPABILITIES) -> dict[str, dict[str, dict[str, float]]]:
    """Compile a file's cases in one process without the interpreter; returns figures by case and capability."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, ",".join(map(str, capabilities)), name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, dict[str, float]]] = json.loads(done.stdout)
    return result


def main() -> None:
    """Print the figures of one file for one compute capability, or record all of them as budgets."""
    if sys.argv[1:2] == ["--record"]:
        path = FOLDER / "compile_cases" / "budgets-{}.{}.json".format(*triton_version())
        budgets = json.loads(path.read_text()) if path.exists() else {}
        for name in sys.argv[2:] or names():
            for case, by_capability in run(name).items():
                for architecture, found in by_capability.items():
                    kept = {key: found[key] for key in ("registers", "instructions_per_element")}
                    budgets.setdefault(case, {})[architecture] = kept
        lines = [
            f'  "{case}": {{\n'
            + ",\n".join(f'    "{key}": {json.dumps(found)}' for key, found in budgets[case].items())
            + "\n  }"
            for case in sorted(budgets)
        ]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    capabilities, name = map(int, sys.argv[1].split(",")), sys.argv[2]
    sys.modules.setdefault("compile_only", sys.modules[__name__])  # one Case class for this file and the cases
    every: dict[str, dict[int, dict[str, float]]] = {}
    for capability in capabilities:
        for launch in cases(name):
            every.setdefault(launch.name, {})[capability] = figures(launch, capability)
    print(json.dumps(every))


if __name__ == "__main__":
    main()
