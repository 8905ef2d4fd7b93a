"""What a machine has for sparse products: GPU, driver and package versions, read without importing torch."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

NVIDIA_SMI_SECONDS = 5.0
"""How long ``nvidia-smi`` may take to answer."""

_DISTRIBUTIONS = {
    "torch": ("torch",),
    "triton": ("triton", "pytorch-triton"),
    "cusparselt": ("nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12"),
    "nvmath": ("nvmath-python",),
    "tilelang": ("tilelang",),
}
_UNKNOWN = r"\[[^\]]*\]|N/A"  # how nvidia-smi writes a value it cannot read
_GPU_LINE = re.compile(rf"\s*(.+?),\s*(\d+\.\d+|{_UNKNOWN}),\s*(\d+(?:\.\d+)+|{_UNKNOWN})\s*")


@dataclass(frozen=True)
class Machine:
    """A machine as the rules of backends see it; None stands for absent or unknown.

    Attributes:
        gpu: Name of the CUDA GPU that torch uses first.
        capability: Its compute capability, major and minor.
        driver: Version of the NVIDIA driver.
        torch: Version of torch, as are the next four of their packages.
        triton: Of Triton.
        cusparselt: Of the cuSPARSELt library, not of a binding to it.
        nvmath: Of nvmath-python, a binding to cuSPARSELt that does not bring the library.
        tilelang: Of TileLang.
        gpu_count: Number of visible GPUs.
        problem: Why no GPU is seen, without a full stop.

    Example:
        >>> Machine(gpu="NVIDIA H200", capability=(9, 0)).capability >= (8, 0)
        True
    """

    gpu: str | None = None
    capability: tuple[int, int] | None = None
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    cusparselt: str | None = None
    nvmath: str | None = None
    tilelang: str | None = None
    gpu_count: int = 0
    problem: str | None = None


class _Gpu(NamedTuple):
    name: str
    capability: tuple[int, int] | None
    driver: str | None


def read_machine() -> Machine:
    """Read the machine from package metadata and ``nvidia-smi``, without importing torch.

    Of several GPUs it describes the first that ``CUDA_VISIBLE_DEVICES`` leaves visible, in nvidia-smi's order.

    Example:
        >>> read_machine().torch is not None
        True
    """
    gpus, problem = _ask_nvidia_smi()
    selection = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = _visible(gpus, selection)
    if not visible:
        hidden = f"CUDA_VISIBLE_DEVICES={selection} hides the {gpus[0].name}" if gpus else problem
        return replace(_packages(), problem=hidden)
    first = visible[0]
    return replace(
        _packages(), gpu=first.name, capability=first.capability, driver=first.driver, gpu_count=len(visible)
    )


def machine_from_torch(device: "torch.device | str | None" = None) -> Machine:
    """Read the machine from torch, which is imported; cheap after the first call, the driver is not asked.

    Args:
        device: The device to describe; torch's current CUDA device by default. One that is not CUDA has no GPU.

    Raises:
        ImportError: If torch is not installed.

    Example:
        >>> machine_from_torch("cpu").problem
        'the device is cpu'
    """
    import torch

    packages = replace(_installed(), torch=str(torch.__version__))
    if device is not None and torch.device(device).type != "cuda":
        return replace(packages, problem=f"the device is {torch.device(device).type}")
    if torch.version.cuda is None:
        built = "for ROCm" if torch.version.hip else "without CUDA"
        return replace(packages, problem=f"torch {torch.__version__} is built {built}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = f": {_first_sentence(str(caught[0].message))}" if caught else ""
        return replace(packages, problem=f"torch {torch.__version__} sees no CUDA device{why}")
    return replace(
        packages,
        gpu=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        cusparselt=_cusparselt_of_torch() or packages.cusparselt,
        gpu_count=torch.cuda.device_count(),
    )


def cache_folder() -> Path:
    """Return the folder of what is measured and proven on this machine; asking does not create it.

    It is ``$SPARSETRAIN_CACHE``, else ``$XDG_CACHE_HOME/sparsetrain``, else ``~/.cache/sparsetrain``.

    Raises:
        RuntimeError: If none of them is known.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    own = os.environ.get("SPARSETRAIN_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser().absolute()
        # the XDG specification tells to ignore relative paths
        return (Path(shared) if shared and Path(shared).is_absolute() else Path.home() / ".cache") / "sparsetrain"
    except RuntimeError:
        raise RuntimeError("the home folder of this user is unknown: set SPARSETRAIN_CACHE to a folder.") from None


def _packages() -> Machine:
    found = Machine(**{package: _version(names) for package, names in _DISTRIBUTIONS.items()})  # type: ignore[arg-type]
    if found.torch is None and importlib.util.find_spec("torch") is not None:
        return replace(found, torch="unknown")  # built from source without metadata
    return found


_installed = functools.cache(_packages)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _ask_nvidia_smi() -> tuple[list[_Gpu], str | None]:
    """Return the GPUs, or none and why."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], "nvidia-smi is not on PATH"
    command = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=NVIDIA_SMI_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer within {NVIDIA_SMI_SECONDS:g} seconds"
    except OSError as error:
        return [], f"nvidia-smi does not start: {error.strerror}"
    gpus = _parse(done.stdout)
    if gpus:
        return gpus, None
    said = _first_sentence(done.stdout + done.stderr)
    what = f"nvidia-smi failed with exit code {done.returncode}" if done.returncode else "nvidia-smi lists no GPU"
    return [], f"{what}: {said}" if said else what


def _first_sentence(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line.partition(". ")[0].rstrip(".")[:200]


def _parse(output: str) -> list[_Gpu]:
    gpus = []
    for line in output.splitlines():
        fields = _GPU_LINE.fullmatch(line)
        if fields is None:
            continue
        name, capability, driver = fields.groups()
        major, _, minor = capability.partition(".")
        gpus.append(
            _Gpu(
                name=name,
                capability=(int(major), int(minor)) if minor.isdigit() else None,
                driver=driver if driver[0].isdigit() else None,
            )
        )
    # MIG slices are parts of a GPU that has a line of its own
    return [gpu for gpu in gpus if not gpu.name.startswith("MIG ")] or gpus


def _visible(gpus: list[_Gpu], selection: str | None) -> list[_Gpu]:
    if selection is None:
        return gpus
    chosen = []
    for entry in (part.strip() for part in selection.split(",")):
        if gpus and entry.startswith(("GPU-", "MIG-")):
            chosen.append(gpus[0])
        elif entry.isdecimal() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)])
        else:
            break  # as CUDA does: what follows an unknown entry is hidden
    return chosen


def _cusparselt_of_torch() -> str | None:
    import torch

    try:
        number = torch.backends.cusparselt.version()
    except RuntimeError:
        return None
    return None if number is None else f"{number // 1000}.{number // 100 % 10}.{number % 100}"
