import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.backends import BACKENDS
from sparsetrain.hardware.machine import Machine
from sparsetrain.recipes.cli.main import main

doctor = importlib.import_module("sparsetrain.recipes.cli.doctor")
HEAVY = {"torch", "lightning", "triton", "datasets", "wandb", "matplotlib", "nvmath", "tilelang"}
CODE = f"""
import sys
from sparsetrain.recipes.cli.main import main
code = main(sys.argv[1:])
assert not set(sys.modules) & {HEAVY}, set(sys.modules) & {HEAVY}
sys.exit(code)
"""
H200 = Machine(gpu="NVIDIA H200", capability=(9, 0), torch="2.13.0+cu130", cusparselt="0.8.1", gpu_count=1)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run ``sparsetrain doctor`` in a process that sees given GPUs and package versions, and imports nothing heavy."""

    def run(*arguments: str, gpus: str = "", **packages: str) -> subprocess.CompletedProcess[str]:
        site, tools = tmp_path / "site", tmp_path / "bin"
        site.mkdir(exist_ok=True)
        tools.mkdir(exist_ok=True)
        for name, version in packages.items():
            folder = site / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if gpus:
            (tools / "nvidia-smi").write_text(f'#!/bin/sh\necho "{gpus}"\n')
            (tools / "nvidia-smi").chmod(0o755)
        hidden = ("CUDA_VISIBLE_DEVICES", "COLUMNS")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        environment |= {"PATH": str(tools), "PYTHONPATH": str(site), "SPARSETRAIN_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-c", CODE, "doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


CUDA_PACKAGES = {"torch": "2.13.0", "nvidia_cusparselt_cu13": "0.8.1", "tilelang": "0.1.15"}


@pytest.mark.parametrize(
    ("gpus", "runs", "able"),
    [
        ("NVIDIA H200, 9.0, 570.86.15", "cusparselt", {"cusparselt", "tilelang", "masked"}),
        ("NVIDIA A100-SXM4-80GB, 8.0, 550.54.15", "cusparselt", {"cusparselt", "cutlass", "tilelang", "masked"}),
        ("NVIDIA GeForce RTX 5090, 12.0, 575.51.03", "cusparselt", {"cusparselt", "masked"}),
        ("Tesla V100-SXM2-16GB, 7.0, 535.129.03", "masked", {"masked"}),
    ],
)
def test_each_gpu_gets_its_backend(run: Run, gpus: str, runs: str, able: set[str]) -> None:
    done = run("--json", gpus=gpus, **CUDA_PACKAGES)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    name, capability, driver = gpus.split(", ")
    machine = report["machine"]
    assert (machine["gpu"], machine["capability"], machine["driver"]) == (name, capability, driver)
    assert (machine["torch"], machine["cusparselt"], machine["tilelang"]) == ("2.13.0", "0.8.1", "0.1.15")
    assert report["will_run"] == runs
    assert {backend for backend, verdict in report["backends"].items() if verdict["why_not"] is None} == able
    shown = run().stdout
    assert f"A 4096x4096 layer in bfloat16 will run on: {runs}\n" in shown
    assert all(value in shown for value in (name, capability, driver, "0.8.1"))
    assert max(len(line) for line in shown.splitlines() if not line.startswith("cache ")) <= 80
    assert not any(line.endswith(" ") for line in shown.splitlines())
    text = " ".join(shown.split())
    for backend, verdict in report["backends"].items():
        assert f"{backend} {verdict['why_not'] or ('runs: ' if backend == runs else 'could run, but')}" in text


def test_a_build_of_torch_without_cuda_is_the_reason_beside_a_gpu(run: Run) -> None:
    report = json.loads(run("--json", gpus="NVIDIA A100, 8.0, 550.54.15", torch="2.13.0+cpu").stdout)
    assert report["will_run"] == "masked"
    for backend in ("cusparselt", "cutlass", "tilelang"):
        assert "torch is 2.13.0+cpu" in report["backends"][backend]["why_not"]


def test_without_a_gpu_it_says_so_and_what_runs(run: Run, tmp_path: Path) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert "GPU         none: nvidia-smi is not on PATH\n" in done.stdout
    assert "will run on: masked\n" in done.stdout
    assert f"{tmp_path / 'cache'} (not there yet)" in " ".join(done.stdout.split())
    assert not (tmp_path / "cache").exists()


def test_several_gpus_are_counted(run: Run) -> None:
    done = run(gpus="NVIDIA H200, 9.0, 570.1\nNVIDIA H200, 9.0, 570.1")
    assert "GPU         2 GPUs, the first: NVIDIA H200\n" in done.stdout


def test_shape_and_dtype_choose_the_layer(run: Run) -> None:
    done = run("--json", "--shape", "4096x11000", "--dtype=float16", gpus="NVIDIA A100, 8.0, 550.1", **CUDA_PACKAGES)
    report = json.loads(done.stdout)
    assert report["layer"] == {"shape": [4096, 11000], "dtype": "float16"}
    assert report["will_run"] == "masked"
    assert "shape is 4096x11000: cusparselt needs" in report["backends"]["cusparselt"]["why_not"]
    assert "make the layer 4096x11008" in report["backends"]["cusparselt"]["why_not"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "4096"], ["--shape", "'4096'", "4096x11008"]),
        (["--shape", "0x16"], ["--shape", "'0x16'"]),
        (["--dtype", "float32"], ["--dtype", "'float32'", "bfloat16", "float16"]),
        (["--porbe"], ["--porbe"]),
        (["extra"], ["extra"]),
    ],
)
def test_a_wrong_option_is_one_sentence_and_exit_code_2(arguments, words, capsys) -> None:
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (sentence,) = captured.err.splitlines()
    assert sentence.startswith("sparsetrain: error: doctor: ")
    assert all(word in sentence for word in words), sentence


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    assert stop.value.code == 0
    assert "examples:\n  sparsetrain doctor\n" in capsys.readouterr().out


def test_without_torch_nothing_runs_and_the_exit_code_is_1(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "read_machine", lambda: Machine(problem="nvidia-smi is not on PATH"))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "will run on: nothing\n" in shown
    assert shown.count("torch is not installed: every backend needs it") == 4


def test_the_cache_is_looked_into(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    (tmp_path / "layouts").mkdir(parents=True)
    (tmp_path / "layouts" / "sm90_64x64.safetensors").touch()
    (tmp_path / "layouts" / "sm90_64x64.safetensors.5f.tmp").touch()
    table = tmp_path / "dispatch.json"
    for text, decisions, line in [
        ('{"entries": {"a": 1, "b": 2}}', 2, "recorded decisions: 2"),
        ('{"entries": [1]}', None, "table unreadable"),
        ("{", None, "table unreadable"),
        ("[]", None, "table unreadable"),
        ("{}", None, "table unreadable"),
    ]:
        table.write_text(text)
        assert doctor.examine((64, 64), "float16")["dispatch_decisions"] == decisions
        assert main(["doctor"]) == 0
        shown = capsys.readouterr().out
        assert f"dispatch    {line}" in shown
        assert "layouts     learned ones on disk: 1 " in shown
    table.write_bytes(b"\xff\xfe")
    report = doctor.examine((64, 64), "float16")
    assert report["dispatch_decisions"] is None
    assert report["layouts"] == {"known": [], "files": ["sm90_64x64.safetensors"]}
    assert report["cache"] == {"folder": str(tmp_path), "exists": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_probing_without_cuda_says_what_was_not_probed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--probe", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["probed"]
    assert report["will_run"] == "masked"
    assert report["backends"]["masked"]["judged_by"] == "probe"
    assert report["machine"]["torch"] == torch.__version__
    (sentence,) = report["not_probed"]
    assert "compute capability, GPU backends and metadata layouts were not probed." in sentence
    assert main(["doctor", "--probe"]) == 0
    assert sentence in " ".join(capsys.readouterr().out.split())


class Probed:
    def __init__(self, answer: str | Exception | None) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        self.allocated: set[tuple[int, int]] = set()

    def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        self.asked.append((device.type, dtype, shape))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def allocate(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.allocated.add(shape)


def _on_an_h200(monkeypatch: pytest.MonkeyPatch, **answers: str | Exception | None) -> dict[str, Probed]:
    backends = {name: Probed(answer) for name, answer in answers.items()}
    for name in ("cusparselt", "cutlass", "tilelang"):
        monkeypatch.delitem(BACKENDS, name, raising=False)
    for name, backend in backends.items():
        monkeypatch.setitem(BACKENDS, name, backend)
    monkeypatch.setattr(doctor, "read_machine", lambda: Machine(driver="570.86.15", torch="2.13.0"))
    monkeypatch.setattr(doctor, "machine_from_torch", lambda: H200)
    return backends


def test_a_probe_asks_the_backends_themselves(monkeypatch, capsys) -> None:
    backends = _on_an_h200(monkeypatch, cusparselt=None, cutlass="not today.", tilelang=OSError("no nvcc"))
    module = types.ModuleType("sparsetrain.backends.cusparselt.metadata_layout")
    proven = types.SimpleNamespace(
        name="learned",
        rows=64,
        columns=96,
        dtype=torch.float16,
        environment="sm_90 cuSPARSELt 0.8.1",
        reason="It fits.",
    )
    module.known_layouts = lambda: [proven]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    report = doctor.examine((4096, 11008), "float16", probe=True)
    assert backends["cusparselt"].asked == [("cuda", torch.float16, (4096, 11008))]
    assert backends["cusparselt"].allocated == {(4096, 11008), (11008, 4096)}  # which proves their layouts
    assert backends["cutlass"].allocated == set()
    assert (report["machine"]["capability"], report["machine"]["driver"]) == ("9.0", "570.86.15")
    assert report["will_run"] == "cusparselt"
    assert {name: verdict["why_not"] for name, verdict in report["backends"].items()} == {
        "cusparselt": None,
        "cutlass": "not today.",
        "tilelang": "its own check failed: no nvcc.",
        "masked": None,
    }
    (known,) = report["layouts"]["known"]
    assert (known["name"], known["shape"], known["dtype"]) == ("learned", [64, 96], "float16")
    assert main(["doctor", "--probe"]) == 0
    assert "layout      learned for 64x96 in float16 on sm_90 cuSPARSELt 0.8.1\n" in capsys.readouterr().out
    assert report["not_probed"] == []
    module.known_layouts = lambda: 1 / 0  # type: ignore[attr-defined]
    assert "division by zero" in doctor.examine((64, 64), "float16", probe=True)["not_probed"][0]


def test_a_backend_of_another_version_is_judged_by_the_rules_but_does_not_run(monkeypatch) -> None:
    _on_an_h200(monkeypatch)
    monkeypatch.setitem(sys.modules, "sparsetrain.backends.cusparselt.metadata_layout", None)
    report = doctor.examine((4096, 4096), "bfloat16", probe=True)
    assert report["will_run"] == "masked"
    assert "9.0" in report["backends"]["cutlass"]["why_not"]
    assert report["backends"]["cutlass"]["judged_by"] == "rules"
    assert "this version has only masked" in report["backends"]["cusparselt"]["why_not"]
    assert report["layouts"]["known"] == []


def test_a_torch_that_cannot_be_imported_runs_nothing(monkeypatch, capsys) -> None:
    def broken() -> Machine:
        raise OSError("libcudart.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(doctor, "machine_from_torch", broken)
    assert main(["doctor", "--probe"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "masked importing torch failed: libcudart.so.13: cannot open shared object file, reinstall torch." in shown
