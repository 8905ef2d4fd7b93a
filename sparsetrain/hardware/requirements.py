"""What each backend needs of machine, dtype and shape: the one place of these rules, without torch."""

from collections.abc import Callable
from dataclasses import dataclass

from .machine import Machine

PREFERENCE = ("cusparselt", "cutlass", "tilelang", "masked")
"""Backends, the one to take first at the front; ``masked`` runs everywhere."""

DTYPES = ("bfloat16", "float16")
"""Dtypes of weights that sparse tensor cores take here."""


@dataclass(frozen=True)
class _Rules:
    runs_on: Callable[[tuple[int, int]], bool]
    capabilities: str
    multiple: int
    package: str | None  # a field of Machine
    install: str


_RULES = {
    "cusparselt": _Rules(
        runs_on=lambda capability: capability >= (8, 0),
        capabilities="8.0 or higher",
        multiple=16,
        package="cusparselt",
        install="pip install nvidia-cusparselt-cu13 (or -cu12, as torch's CUDA)",
    ),
    "cutlass": _Rules(
        runs_on=lambda capability: capability[0] == 8,
        capabilities="8.x",
        multiple=64,
        package=None,
        install="",
    ),
    "tilelang": _Rules(
        runs_on=lambda capability: capability[0] == 8 or capability == (9, 0),
        capabilities="8.x or 9.0",
        multiple=128,
        package="tilelang",
        install="pip install tilelang",
    ),
}


def why_not(backend: str, machine: Machine, dtype: str, shape: tuple[int, int]) -> str | None:
    """Say in one sentence why a backend cannot run a layer on a machine, or return None.

    Args:
        backend: One of ``PREFERENCE``.
        machine: Where the layer is to run.
        dtype: Of the weight in the product, such as ``"bfloat16"`` or ``"torch.bfloat16"``.
        shape: Of the weight, ``(O, I)``; both count alike, because W and Wᵀ are packed.

    Raises:
        ValueError: If there is no such backend.

    Example:
        >>> why_not("cutlass", Machine(gpu="NVIDIA H200", capability=(9, 0), torch="2.13.0"), "float16", (64, 64))
        'GPU NVIDIA H200 has compute capability 9.0: cutlass needs 8.x, use another backend.'
        >>> why_not("masked", Machine(), "float32", (3, 5)) is None
        True
    """
    if backend not in PREFERENCE:
        raise ValueError(f"backend is {backend!r}: it must be one of {', '.join(PREFERENCE)}.")
    if backend == "masked":
        return None
    rules = _RULES[backend]
    return (
        _gpu_complaint(backend, rules, machine)
        or _package_complaint(backend, rules, machine)
        or _layer_complaint(backend, rules, dtype.removeprefix("torch."), shape)
    )


def _gpu_complaint(backend: str, rules: _Rules, machine: Machine) -> str | None:
    if machine.gpu is None:
        seen = f"no CUDA GPU ({machine.problem})" if machine.problem else "no CUDA GPU"
        return f"{seen}: {backend} needs one of compute capability {rules.capabilities}, use masked here."
    if machine.capability is None:
        return (
            f"GPU {machine.gpu} tells no compute capability: "
            f"{backend} needs {rules.capabilities}, update the NVIDIA driver."
        )
    if not rules.runs_on(machine.capability):
        major, minor = machine.capability
        return (
            f"GPU {machine.gpu} has compute capability {major}.{minor}: "
            f"{backend} needs {rules.capabilities}, use another backend."
        )
    return None


def _package_complaint(backend: str, rules: _Rules, machine: Machine) -> str | None:
    build = (machine.torch or "").partition("+")[2]
    if machine.torch is None:
        return f"torch is not installed: {backend} needs a CUDA build of it, pip install torch."
    if build.startswith(("cpu", "rocm", "xpu")):
        return f"torch is {machine.torch}: {backend} needs a CUDA build, install torch without +{build}."
    if rules.package is not None and getattr(machine, rules.package) is None:
        return f"{rules.package} is not installed: the backend {backend} needs it, {rules.install}."
    return None


def _layer_complaint(backend: str, rules: _Rules, dtype: str, shape: tuple[int, int]) -> str | None:
    if dtype not in DTYPES:
        return f"dtype is {dtype}: {backend} needs {' or '.join(DTYPES)}, cast the layer or train under autocast."
    if any(size < 1 or size % rules.multiple for size in shape):
        rows, columns = (max(1, -(-size // rules.multiple)) * rules.multiple for size in shape)
        return (
            f"shape is {shape[0]}x{shape[1]}: {backend} needs rows and columns that are multiples of "
            f"{rules.multiple}, make the layer {rows}x{columns} or use another backend."
        )
    return None
