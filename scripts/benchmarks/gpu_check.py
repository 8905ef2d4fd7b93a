"""``scripts/gpu_check``: the tests and benchmarks that need a GPU, each in its own process with a time limit."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
BENCH = [sys.executable, str(ROOT / "scripts" / "benchmarks" / "main.py")]


def stages(out: Path) -> dict[str, tuple[list[str], int]]:
    """Return what is run, by name, and the seconds it may take: 8½ minutes together."""
    return {
        "kernel tests": ([*PYTEST, "tests/kernels", "-k", "not budgets", f"--junitxml={out}/kernels.xml"], 240),
        "training tests": ([*PYTEST, "-m", "gpu", "tests/sparsetrain", f"--junitxml={out}/training.xml"], 90),
        "kernel benchmark": ([*BENCH, "kernels", "--csv", f"{out}/kernels.csv"], 180),
    }


def main() -> int:
    """Run the stages and return the exit code: 0 if all passed, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Run all tests and benchmarks that need a GPU, in under nine minutes; write logs, CSV and JSON.",
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
    for name, (command, limit) in stages(out).items():
        start = time.monotonic()
        result = run(command, out / f"{name.replace(' ', '_')}.log", limit)
        summary["stages"][name] = {"result": result, "seconds": round(time.monotonic() - start, 1)}
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name, found in summary["stages"].items():
        print(f"{name:20} {found['result']:20} {found['seconds']:8.1f} s")
    print(f"logs, CSV and summary.json are in {out}")
    return int(any(found["result"] != "passed" for found in summary["stages"].values()))


def run(command: list[str], log: Path, limit: int) -> str:
    """Run a stage, show and keep what it prints, and return how it ended."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env={**os.environ, "COLUMNS": "160"},
            )
            result = "passed" if done.returncode == 0 else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            result = f"over {limit} s"
    print("".join(log.read_text().splitlines(keepends=True)[-40:]))
    return result


def environment() -> dict[str, object]:
    """Return the versions and the device that the results belong to."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    cusparselt = getattr(torch.backends, "cusparselt", None)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver, clock, power": found,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "cusparselt": cusparselt.version() if cusparselt and cusparselt.is_available() else None,
        "commit": commit.stdout.strip(),
    }


if __name__ == "__main__":
    sys.exit(main())
