"""What ``scripts/gpu_check`` runs: four parts of at most ten minutes, the most valuable facts first."""

from collections.abc import Sequence
from pathlib import Path

from .stage import GRACE, PYTEST, ROOT, Stage

PART_SECONDS = 570.0  # of a part, the ending of its last stage included
TESTS = (*PYTEST, "-v", "--durations=15", "-p", "no:cacheprovider", "--color=no")
# what a GPU, its driver and their packages warn of is not known before: it is to be read, not to fail
WARNINGS = ("-W", "default")
PRODUCT_TESTS = "tests/sparsetrain/gpu/test_products_on_a_gpu.py"
PROVIDERS = ("nvmath", "torch")
"""Ways to cuSPARSELt: each has some 40 algorithms, which are verified for minutes."""
KERNEL_PROCESSES = 4  # at once, because compiling kernels is work of the host's cores

TITLES = {
    "smoke": "first products, versions, algorithms, the order of metadata, product tests, products against dense ones",
    "step": "whole training steps of GPTs against a compiled dense baseline",
    "kernels": "kernel tests, kernels and layers against the memory's speed",
    "tilelang": "the TileLang backend",
}


def parts(out: Path, dry_run: bool) -> dict[str, list[Stage]]:
    """Return the stages of every part, in the order in which they run.

    Args:
        out: The folder of all results; a part writes into a folder of its own there.
        dry_run: The same stages in the smallest sizes, on a CPU and on stand-ins for sparse backends.
    """
    return {
        "smoke": _smoke(out / "smoke", dry_run),
        "step": _step(out / "step", dry_run),
        "kernels": _kernels(out / "kernels", dry_run),
        "tilelang": _tilelang(out / "tilelang", dry_run),
    }


def _smoke(out: Path, dry_run: bool) -> list[Stage]:
    dry = ["--stand-in"] if dry_run else []
    algorithms = [f"every_algorithm and {name}" for name in PROVIDERS]
    others = "not (" + " or ".join([*(f"({words})" for words in algorithms), f"({_tilelang_tests(dry_run)})"]) + ")"
    training = [*_pytest(out, "training_tests", "-m", "gpu", "tests/sparsetrain"), f"--ignore={PRODUCT_TESTS}"]
    if dry_run:
        training = _pytest(out, "training_tests", "-m", "gpu", "tests/sparsetrain/gpu/test_runs_on_a_gpu.py")
    return [
        _one("facts", [*_module("facts"), "--out", str(out / "facts.json"), *dry], 40),
        _one("first_contact", [*_module("contact"), "--out", str(out / "contact.jsonl"), *dry], 110),
        _one("metadata", [*_module("metadata"), "--out", str(out / "metadata"), *dry], 60),
        _one("product_tests", _pytest(out, "product_tests", PRODUCT_TESTS, "-k", others), 80),
        *(
            _one(f"algorithms_{name}", _pytest(out, f"algorithms_{name}", PRODUCT_TESTS, "-k", words), 60)
            for name, words in zip(PROVIDERS, algorithms, strict=True)
        ),
        _one("training_tests", training, 40),
        _one("gemm", _bench("gemm", out, dry_run, _grid(dry_run, "75"), dry), 100),
    ]


def _step(out: Path, dry_run: bool) -> list[Stage]:
    seconds = {"1.3B": 260, "350M": 150, "124M": 120}
    if dry_run:
        tiny = ["--model", "tiny", "--compile", "none", "--backend", "simulated"]
        turns = {"1.3B": ["--steps", "2", "--rounds", "2"]}
        shorter = ["--steps", "1", "--rounds", "1", "--no-fp8"]
        return [
            _one(f"step_{model}", _bench("step", out, True, [*tiny, *turns.get(model, shorter)], ["--stand-in"]), limit)
            for model, limit in seconds.items()
        ]
    return [
        _one(f"step_{model}", _bench("step", out, False, ["--model", model, "--seconds", str(limit - 40)]), limit)
        for model, limit in seconds.items()
    ]


def _kernels(out: Path, dry_run: bool) -> list[Stage]:
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    if dry_run:
        files = [file for file in files if file.stem in ("test_tile_codes", "test_on_a_gpu")]
    # a process for each file: a kernel that faults takes the device from the tests of its own process alone
    tests = {
        f"kernel_{file.stem}": _pytest(out, f"kernel_{file.stem}", str(file.relative_to(ROOT)), "-k", "not budgets")
        for file in files
    }
    kernels = _bench("kernels", out, dry_run, ["--shape", "16x32", "--repeats", "1"] if dry_run else [])
    return [
        Stage("kernel_tests", tests, 300, KERNEL_PROCESSES),
        _one("kernels", kernels, 120),
        _one("linear", _bench("linear", out, dry_run, _grid(dry_run, "80")), 110),
    ]


def _tilelang(out: Path, dry_run: bool) -> list[Stage]:
    way = "simulated" if dry_run else "tilelang"
    dry = ["--stand-in"] if dry_run else []
    contact = [*_module("contact"), "--way", way, "--out", str(out / "contact.jsonl"), *dry]
    return [
        _one("tilelang_contact", contact, 120),
        _one("tilelang_tests", _pytest(out, "tilelang_tests", PRODUCT_TESTS, "-k", _tilelang_tests(dry_run)), 200),
        _one("tilelang_gemm", _bench("gemm", out, dry_run, ["--way", way, *_grid(dry_run, "170")], dry), 210),
    ]


def _tilelang_tests(dry_run: bool) -> str:
    return "cutlass and strides" if dry_run else "tilelang"  # which has no stand-in


def _one(name: str, command: Sequence[str], seconds: float) -> Stage:
    return Stage(name, {name: command}, seconds)


def _module(name: str) -> list[str]:
    return ["-m", f"scripts.benchmarks.{name}"]


def _pytest(out: Path, name: str, *arguments: str) -> list[str]:
    return [*TESTS, *WARNINGS, *arguments, f"--junitxml={out / name}.xml"]


def _bench(name: str, out: Path, dry_run: bool, options: Sequence[str], stand_in: Sequence[str] = ()) -> list[str]:
    place = ["--device", "cpu"] if dry_run and name != "kernels" else []
    return [*_module("main"), name, *options, *place, *stand_in, "--csv", str(out / f"{name}.csv")]


def _grid(dry_run: bool, seconds: str) -> list[str]:
    if dry_run:
        return ["--tokens", "32", "--shape", "32x64", "--dtype", "bfloat16", "--repeats", "1"]
    return ["--quick", "--seconds", seconds]


def longest(stages: Sequence[Stage]) -> float:
    """Return the seconds that a part can take."""
    return sum(stage.seconds for stage in stages) + GRACE
