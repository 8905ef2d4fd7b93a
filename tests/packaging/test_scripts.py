import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def script(module: str, *arguments: str, limit: int = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"scripts.{module}", *arguments]
    # this checkout's package, whichever is installed; threads that wait for each other make small products slow
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT, env=environment)


def rows_of(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(path.open()))
    assert all(0 <= float(row["y_value_20"]) <= float(row["y_value_50"]) <= float(row["y_value_80"]) for row in rows)
    assert all(row["device"] and row["torch_version"] and row["commit"] for row in rows)
    return rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = script("gpu.gpu_check", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "There is no CUDA device" in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_kernel_benchmark_prints_a_table_and_writes_rows(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    done = script("benchmarks.main", "kernels", "--shape", "64x128", "--repeats", "2", "--csv", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "matmul-90" in done.stdout
    rows = rows_of(path)
    assert {"search", "search and pack", "pack", "statistics"} <= {row["kernel_name"] for row in rows}
    assert all(float(row["y_value_20"]) > 0 and row["x_value"].startswith("64x128") for row in rows)


def test_a_wrong_shape_is_one_sentence() -> None:
    done = script("benchmarks.main", "kernels", "--shape", "4096x5")
    assert done.returncode == 2
    assert "'4096x5' is no shape: write rows and columns, multiples of 4" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [("gemm",), ("linear", "--quick"), ("step", "--model", "124M")], ids=" ".join)
def test_benchmarks_of_a_gpu_say_in_a_sentence_that_there_is_none(arguments: tuple[str, ...]) -> None:
    done = script("benchmarks.main", *arguments)
    assert done.returncode == 2
    assert "needs a CUDA device and there is none here" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not done.stderr


def test_the_whole_grid_is_not_measured_on_a_cpu() -> None:
    done = script("benchmarks.main", "gemm", "--device", "cpu", "--tokens", "64")
    assert done.returncode == 2
    assert "gemm --device cpu needs small --tokens and --shape" in done.stdout


def test_the_gemm_benchmark_on_a_cpu_compares_dense_and_masked_products(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    grid = ("--tokens", "32", "--tokens", "64", "--shape", "64x128", "--dtype", "bfloat16", "--repeats", "2")
    done = script("benchmarks.main", "gemm", "--device", "cpu", *grid, "--csv", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ratio to dense" in done.stdout
    rows = rows_of(path)
    assert [(row["x_value"], row["kernel_provider"]) for row in rows] == [
        ("32", "dense"), ("32", "masked"), ("64", "dense"), ("64", "masked")
    ]  # fmt: skip
    assert {row["kernel_name"] for row in rows} == {"gemm forward 64x128 bfloat16"}
    assert {row["metric_name"] for row in rows} == {"wall time"}


def test_the_linear_benchmark_times_steps_and_both_passes_of_every_backend_there_is(tmp_path: Path) -> None:
    path = tmp_path / "linear.csv"
    grid = ("--tokens", "32", "--shape", "64x128", "--repeats", "2", "--micro-batches", "2")
    done = script("benchmarks.main", "linear", "--device", "cpu", *grid, "--csv", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cusparselt does not run here: " in done.stdout
    rows = rows_of(path)
    whats = ("step of 2 micro-batches", "forward", "backward")
    assert [(row["kernel_name"], row["kernel_provider"]) for row in rows] == [
        (f"linear {what} 64x128 bfloat16", name) for what in whats for name in ("dense", "sparse auto", "sparse masked")
    ]


@pytest.mark.sweep
def test_the_step_benchmark_trains_in_turns_and_a_variant_that_fails_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    tiny = ("--model", "tiny", "--device", "cpu", "--compile", "none", "--backend", "masked", "--backend", "nowhere")
    turns = ("--steps", "45", "--rounds", "3")
    done = script("benchmarks.main", "step", *tiny, *turns, "--csv", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    failing = [line for line in done.stdout.splitlines() if "nowhere" in line]
    assert len(failing) == 1
    assert failing[0].startswith("sparse nowhere, eager: fails with ValueError: backend is 'nowhere'")
    found = {(row["kernel_provider"], row["metric_name"]): float(row["y_value_50"]) for row in rows_of(path)}
    assert found["dense, eager", "step time"] > 0
    # 4 sequences of 32 tokens; both are rounded to five digits, and medians of an odd number of steps
    assert found["dense, eager", "speed"] * found["dense, eager", "step time"] == pytest.approx(128e3, rel=1e-3)
    assert ("dense, eager", "share of refresh") not in found
    # one of the 45 timed steps searches masks
    assert 0 < found["sparse masked, eager", "share of refresh"] < 1
    assert found["sparse masked, eager", "mean step time"] > 0
    ratio = found["sparse masked, eager", "baseline step time"] / found["sparse masked, eager", "step time"]
    assert found["sparse masked, eager", "ratio to baseline"] == pytest.approx(ratio, rel=1e-3)
    assert found["fp8 dense, eager", "ratio to baseline"] > 0
    assert "so give --peak-tflops" in done.stdout


@pytest.mark.sweep
def test_methods_are_compared_at_equal_seeds(tmp_path: Path) -> None:
    out = tmp_path / "results" / "methods"
    run = ("--task", "gpt", "--model", "tiny", "--steps", "20", "--seeds", "2", "--method", "asp_one_shot")
    places = ("--runs", str(tmp_path / "runs"), "--out", str(out))
    done = script("reproduction.main", *run, *places, limit=280)
    assert done.returncode == 0, done.stderr[-2000:]
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    final = {(row["method"], row["seed"]): float(row["loss"]) for row in rows if row["step"] == "20"}
    assert set(final) == {(method, seed) for method in ("dense", "asp_one_shot") for seed in ("0", "1")}
    first = {(row["method"], row["seed"]): row["loss"] for row in rows if row["step"] == "2"}
    assert first["dense", "0"] == first["asp_one_shot", "0"] != first["dense", "1"]  # dense until half of the steps
    gap = sum(final["asp_one_shot", seed] - final["dense", seed] for seed in ("0", "1")) / 2
    lines = out.with_suffix(".md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| asp_one_shot |"))
    assert float(line.split("|")[3].split()[0]) == pytest.approx(gap, abs=2e-4)  # both are rounded
    assert line.split("|")[8].strip() == "2:4"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
