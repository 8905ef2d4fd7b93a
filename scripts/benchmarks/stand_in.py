"""The tests' stand-ins for sparse backends, so that a machine without a GPU runs what needs them."""

import functools
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch

from sparsetrain.backends import BACKENDS, Backend, CuSparseLtBackend
from sparsetrain.backends.cusparselt import CuSparseLt, Library
from sparsetrain.backends.cusparselt.providers import NvmathProvider

HELPERS = Path(__file__).resolve().parents[2] / "tests" / "helpers"
DEADLY = "deadly"  # an algorithm that ends its process, as one that faults on a GPU takes the context along


@functools.cache
def backends() -> dict[str, Backend]:
    """Return backends by name that compute on a CPU: ``simulated``, and ``cusparselt`` where nvmath is installed."""
    if str(HELPERS) not in sys.path:
        sys.path.append(str(HELPERS))
    import simulated_backend

    class Simulated(simulated_backend.SimulatedBackend):
        def product(self, operand, rows, bias=None, algorithm="", transposed_output=False):  # type: ignore[no-untyped-def]
            if algorithm == DEADLY:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().product(operand, rows, bias, algorithm, transposed_output)

    found: dict[str, Backend] = {"simulated": Simulated(algorithms=("0", "wrong", DEADLY, "1"))}
    if importlib.util.find_spec("nvmath") is not None:
        import fake_cusparselt

        class Open(CuSparseLtBackend):
            def why_not(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
                return None

        devices = fake_cusparselt.FakeDevices()
        library = CuSparseLt(Library(fake_cusparselt.FakeCuSparseLt(devices)), devices)
        found["cusparselt"] = Open([NvmathProvider(library)])
    return found


def install() -> None:
    """Let layers of this process use the stand-ins by their names."""
    BACKENDS.update(backends())
