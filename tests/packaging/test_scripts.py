import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmarks" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = script("gpu_check.py", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "There is no CUDA device" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_kernel_benchmark_prints_a_table_and_writes_rows(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    done = script("main.py", "kernels", "--shape", "64x128", "--repeats", "2", "--csv", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "matmul-90" in done.stdout
    rows = list(csv.DictReader(path.open()))
    assert {"search", "search and pack", "pack", "statistics"} <= {row["kernel_name"] for row in rows}
    assert all(0 < float(row["y_value_20"]) <= float(row["y_value_50"]) <= float(row["y_value_80"]) for row in rows)
    assert all(row["x_value"].startswith("64x128") and row["torch_version"] and row["commit"] for row in rows)


def test_a_wrong_shape_is_one_sentence() -> None:
    done = script("main.py", "kernels", "--shape", "4096x5")
    assert done.returncode == 2
    assert "'4096x5' is no shape: write rows and columns, multiples of 4" in done.stderr
