"""Dispatch: the backend and algorithm of each product, benchmarked here, and the table that stores the choice."""

import functools

import torch

from ..environment import cache_folder, machine_from_torch, read_machine
from .faults import DeviceFaultError
from .problem import MASKED, Choice, Problem, Product, bucket
from .stopwatch import median_milliseconds
from .table import Decision, DispatchTable
from .tuner import Tuner
from .verify import find_mismatch

__all__ = [
    "MASKED",
    "Choice",
    "Decision",
    "DeviceFaultError",
    "DispatchTable",
    "Problem",
    "Product",
    "Tuner",
    "bucket",
    "describe_environment",
    "find_mismatch",
    "tuner_for",
]  # fmt: skip


def describe_environment(device: torch.device) -> str:
    """Return GPU, driver and versions in one line: what a measurement depends on.

    Example:
        >>> describe_environment(torch.device("cpu")).startswith("no GPU, torch ")
        True
    """
    machine = machine_from_torch(device)
    gpu = "no GPU"
    if machine.gpu is not None and machine.capability is not None:
        gpu = f"{machine.gpu} sm_{machine.capability[0]}{machine.capability[1]}, driver {read_machine().driver}"
    versions = {"torch": machine.torch, "cuSPARSELt": machine.cusparselt, "nvmath": machine.nvmath,
                "tilelang": machine.tilelang}  # fmt: skip
    return ", ".join([gpu, *(f"{name} {version}" for name, version in versions.items() if version)])


@functools.cache
def tuner_for(device: torch.device) -> Tuner:
    """Return the tuner of a device; its decisions are in ``dispatch.json`` of the cache folder.

    Example:
        >>> tuner_for(torch.device("cpu")).choose(Problem("forward", (64, 64), 8, torch.float32), torch.device("cpu"))
        Choice(backend='masked', algorithm='')
    """
    if device.type != "cuda":
        return Tuner(DispatchTable(), describe_environment(device))
    return Tuner(
        DispatchTable(cache_folder() / "dispatch.json"), describe_environment(device), stopwatch=median_milliseconds
    )
