"""``scripts/gpu_check``: the tests and benchmarks that need a GPU, each in its own process with a time limit."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
PARALLEL = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # compiling kernels is work of the host's cores
BENCH = [sys.executable, str(ROOT / "scripts" / "benchmarks" / "main.py")]
PRODUCT_TESTS = "tests/sparsetrain/test_products_on_a_gpu.py"
NOT_HERE = 2  # exit code of a benchmark that lacks a package


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds after which it is ended; what earlier stages leave of theirs is added."""

    command: list[str]
    seconds: int


def stages(out: Path) -> dict[str, Stage]:
    """Return what is run, by name: tests first, then benchmarks, in nine minutes together."""
    training = ["-m", "gpu", "tests/sparsetrain", f"--ignore={PRODUCT_TESTS}"]
    return {
        "product tests": Stage([*PYTEST, "-m", "gpu", PRODUCT_TESTS, f"--junitxml={out}/products.xml"], 70),
        "kernel tests": Stage(
            [*PYTEST, *PARALLEL, "tests/kernels", "-k", "not budgets", f"--junitxml={out}/kernels.xml"], 110
        ),
        "training tests": Stage([*PYTEST, *training, f"--junitxml={out}/training.xml"], 40),
        "gemm benchmark": Stage(_bench("gemm", out, "--quick", "--seconds", "90"), 110),
        "step benchmark": Stage(_bench("step", out, "--model", "124M", "--seconds", "50"), 90),
        "linear benchmark": Stage(_bench("linear", out, "--quick", "--seconds", "45"), 60),
        "kernel benchmark": Stage(_bench("kernels", out), 60),
    }


def _bench(name: str, out: Path, *options: str) -> list[str]:
    return [*BENCH, name, *options, "--csv", str(out / f"{name}.csv")]


def main() -> int:
    """Run the stages and return the exit code: 0 if all passed, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Run all tests and benchmarks that need a GPU, in nine minutes; write logs, CSV and JSON.",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder (default: %(default)s)")
    out: Path = parser.parse_args().out.resolve()
    import torch

    if not torch.cuda.is_available():
        print(
            "There is no CUDA device: on a machine with one, this runs " + ", ".join(stages(out)) + f" and fills {out}."
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    summary = {"environment": environment(), "stages": {}}
    spare = 0.0
    for name, stage in stages(out).items():
        start = time.monotonic()
        limit = stage.seconds + spare
        result = run(stage.command, out / f"{name.replace(' ', '_')}.log", limit)
        spare = max(0.0, limit - (time.monotonic() - start))
        summary["stages"][name] = {"result": result, "seconds": round(time.monotonic() - start, 1)}
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, found in summary["stages"].items():
        print(f"{name:20} {found['result']:20} {found['seconds']:8.1f} s")
    print(f"logs, CSV and summary.json are in {out}")
    return int(any(found["result"] not in ("passed", "not run") for found in summary["stages"].values()))


def run(command: list[str], log: Path, limit: float) -> str:
    """Run a stage, show and keep what it prints, and return how it ended."""
    with log.open("w") as file:
        stage = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "160"},
            start_new_session=True,
        )  # fmt: skip
        try:
            code = stage.wait(limit)
            result = "passed" if code == 0 else f"failed ({code})"
            if code == NOT_HERE and command[: len(BENCH)] == BENCH:
                result = "not run"
        except subprocess.TimeoutExpired:
            result = f"over {limit:.0f} s"
        finally:
            if stage.poll() is None:
                os.killpg(stage.pid, signal.SIGKILL)  # its workers too, which would keep the device
                stage.wait()
    print("".join(log.read_text().splitlines(keepends=True)[-40:]))
    return result


def environment() -> dict[str, object]:
    """Return the versions and the device that the results belong to."""
    import torch
    import triton
    from measure import commit

    from sparsetrain.environment import read_machine

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    cusparselt = getattr(torch.backends, "cusparselt", None)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver, clock, power": found,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "cusparselt": cusparselt.version() if cusparselt and cusparselt.is_available() else None,
        "nvmath": read_machine().nvmath,
        "commit": commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
