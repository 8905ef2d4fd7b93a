import dataclasses
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsetrain.hardware import machine as environment
from sparsetrain.hardware.machine import Machine, cache_folder, machine_from_torch, read_machine

FAILED = """NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest
NVIDIA driver is installed and running."""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put an ``nvidia-smi`` on PATH that prints a text to any call with the right query and exits with a code."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(output: str, code: int = 0, head: str = "#!/bin/sh") -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        tool = folder / "nvidia-smi"
        query = "--query-gpu=name,compute_cap,driver_version --format=csv,noheader"
        tool.write_text(
            f'{head}\n[ "$*" = "{query}" ] || exit 77\nwhile read -r line; do echo "$line"; done <<"EOF"\n{output}\n'
            f"EOF\nexit {code}\n"
        )
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return tool

    return put


@pytest.mark.parametrize(
    ("line", "gpu", "capability", "driver"),
    [
        ("NVIDIA H200, 9.0, 570.86.15", "NVIDIA H200", (9, 0), "570.86.15"),
        ("NVIDIA A100-SXM4-80GB, 8.0, 550.54", "NVIDIA A100-SXM4-80GB", (8, 0), "550.54"),
        ("NVIDIA GeForce RTX 5090, 12.0, 575.51.03", "NVIDIA GeForce RTX 5090", (12, 0), "575.51.03"),
        ("Tesla V100-SXM2-16GB, 7.0, 535.129.03", "Tesla V100-SXM2-16GB", (7, 0), "535.129.03"),
        ("Some GPU, rev. 2, 8.6, 535.129.03", "Some GPU, rev. 2", (8, 6), "535.129.03"),
        ("Odd GPU, [N/A], [Unknown Error]", "Odd GPU", None, None),
        ("Odd GPU, N/A, 535.129.03", "Odd GPU", None, "535.129.03"),
    ],
)
def test_nvidia_smi_is_read(nvidia_smi, line, gpu, capability, driver) -> None:
    nvidia_smi(line)
    machine = read_machine()
    assert (machine.gpu, machine.capability, machine.driver) == (gpu, capability, driver)
    assert (machine.gpu_count, machine.problem) == (1, None)


@pytest.mark.parametrize(
    ("visible", "gpu", "count"),
    [
        (None, "NVIDIA A", 3),
        ("1", "NVIDIA B", 1),
        ("2, 0", "NVIDIA C", 2),
        ("1,7,0", "NVIDIA B", 1),
        ("GPU-5ebe9e2b", "NVIDIA A", 1),
        ("MIG-5ebe9e2b", "NVIDIA A", 1),
    ],
)
def test_of_several_gpus_the_first_visible_one_counts(nvidia_smi, monkeypatch, visible, gpu, count) -> None:
    nvidia_smi("NVIDIA A, 8.0, 570.1\nNVIDIA B, 9.0, 570.1\nNVIDIA C, 9.0, 570.1")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = read_machine()
    assert (machine.gpu, machine.gpu_count) == (gpu, count)


@pytest.mark.parametrize("visible", ["", "-1", "3", "none"])
def test_hidden_gpus_are_not_there(nvidia_smi, monkeypatch, visible: str) -> None:
    nvidia_smi("NVIDIA H200, 9.0, 570.86.15")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = read_machine()
    assert (machine.gpu, machine.capability, machine.gpu_count) == (None, None, 0)
    assert machine.problem == f"CUDA_VISIBLE_DEVICES={visible} hides the NVIDIA H200"


def test_warnings_and_mig_lines_are_no_gpus(nvidia_smi) -> None:
    nvidia_smi(
        "WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n"
        "NVIDIA H200, 9.0, 570.86.15\n"
        "  MIG 1g.18gb     Device  0: (UUID: MIG-2fcd7d5c, 1, 2)\n"
        "MIG 1g.18gb, 9.0, 570.86.15"
    )
    machine = read_machine()
    assert (machine.gpu, machine.gpu_count) == ("NVIDIA H200", 1)


def test_a_mig_slice_without_its_gpu_counts(nvidia_smi) -> None:
    nvidia_smi("MIG 1g.18gb, 9.0, 570.86.15")
    assert read_machine().capability == (9, 0)


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        (FAILED, 9, "exit code 9: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver"),
        ("No devices were found", 6, "nvidia-smi failed with exit code 6: No devices were found"),
        ("No devices were found", 0, "nvidia-smi lists no GPU: No devices were found"),
        ('Field "compute_cap" is not a valid field to query.', 2, "compute_cap"),
        ("", 0, "nvidia-smi lists no GPU"),
        ("a, b, c, d", 0, "nvidia-smi lists no GPU: a, b, c, d"),
    ],
)
def test_a_failing_tool_is_no_gpu_and_says_why(nvidia_smi, output: str, code: int, words: str) -> None:
    nvidia_smi(output, code)
    machine = read_machine()
    assert (machine.gpu, machine.gpu_count) == (None, 0)
    assert machine.problem is not None
    assert words in machine.problem
    assert len(machine.problem) < 140
    assert "\n" not in machine.problem


def test_a_missing_tool_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_machine().problem == "nvidia-smi is not on PATH"


def test_a_tool_that_does_not_start_is_no_gpu(nvidia_smi) -> None:
    nvidia_smi("NVIDIA H200, 9.0, 570.86.15", head="#!/no/such/interpreter")
    assert read_machine().problem == "nvidia-smi does not start: No such file or directory"


def test_a_tool_that_hangs_is_no_gpu(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(environment, "NVIDIA_SMI_SECONDS", 0.2)
    assert read_machine().problem == "nvidia-smi gave no answer within 0.2 seconds"


def _read_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> Machine:
    for name, version in packages.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        patch.setitem(sys.modules, "torch", None)
        return read_machine()


def test_versions_come_from_package_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {
        "torch": "2.13.0+cu130",
        "triton": "3.7.1",
        "nvidia-cusparselt-cu13": "0.8.1",
        "nvmath-python": "1.0.0",
        "tilelang": "0.1.15",
    }
    machine = _read_with(tmp_path, monkeypatch, packages)
    found = (machine.torch, machine.triton, machine.cusparselt, machine.nvmath, machine.tilelang)
    assert found == tuple(packages.values())


def test_either_cusparselt_wheel_counts_and_what_is_absent_is_none(tmp_path, monkeypatch) -> None:
    machine = _read_with(tmp_path, monkeypatch, {"nvidia-cusparselt-cu12": "0.7.1", "torch": "2.11.0"})
    assert (machine.cusparselt, machine.torch) == ("0.7.1", "2.11.0")
    assert (machine.triton, machine.nvmath, machine.tilelang) == (None, None, None)


def test_a_torch_without_metadata_is_seen_and_not_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        patch.delitem(sys.modules, "torch")
        assert read_machine().torch == "unknown"


def test_a_machine_is_frozen_and_empty_by_default() -> None:
    machine = Machine()
    assert not any(dataclasses.asdict(machine).values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        machine.gpu = "NVIDIA H200"  # type: ignore[misc]


def test_torch_is_asked_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU at {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    machine = machine_from_torch(torch.device("cuda", 1))
    assert (machine.gpu, machine.capability, machine.gpu_count) == ("GPU at cuda:1", (9, 0), 2)
    assert (machine.cusparselt, machine.torch) == ("0.8.1", torch.__version__)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 1203)
    assert machine_from_torch().cusparselt == "1.2.3"


def test_torch_without_a_device_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        warnings.warn("CUDA initialization: the driver is too old (found version 11040). Update it.", stacklevel=1)
        return False

    assert machine_from_torch("cpu").gpu is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    problem = machine_from_torch().problem
    assert problem is not None
    assert problem.endswith("sees no CUDA device: CUDA initialization: the driver is too old (found version 11040)")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert machine_from_torch().problem == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "hip", "6.4")  # its GPUs report a capability too, such as (9, 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    machine = machine_from_torch()
    assert machine.problem == f"torch {torch.__version__} is built for ROCm"
    assert machine.capability is None


@pytest.mark.gpu
def test_nvidia_smi_and_torch_agree() -> None:
    if shutil.which("nvidia-smi") is None or torch.cuda.device_count() > 1:
        pytest.skip("needs nvidia-smi and one GPU")
    read, probed = read_machine(), machine_from_torch()
    assert (read.capability, read.gpu_count) == (probed.capability, probed.gpu_count)


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("SPARSETRAIN_CACHE", "~/own")
    assert cache_folder() == tmp_path / "home" / "own"
    monkeypatch.setenv("SPARSETRAIN_CACHE", "")
    assert cache_folder() == tmp_path / "shared" / "sparsetrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "sparsetrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "sparsetrain"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_home_is_one_sentence_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPARSETRAIN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(RuntimeError, match=r"home folder .* unknown: set SPARSETRAIN_CACHE to a folder\."):
        cache_folder()
