"""The tuner of each device, and what its measurements depend on."""

import functools

import torch

from ..hardware.machine import cache_folder, machine_from_torch, read_machine
from .stopwatch import median_milliseconds
from .table import DispatchTable
from .tuner import Tuner


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
    versions = {
        "torch": machine.torch,
        "cuSPARSELt": machine.cusparselt,
        "nvmath": machine.nvmath,
        "tilelang": machine.tilelang,
    }
    return ", ".join([gpu, *(f"{name} {version}" for name, version in versions.items() if version)])


@functools.cache
def tuner_for(device: torch.device) -> Tuner:
    """Return the tuner of a device; its decisions are in ``dispatch.json`` of the cache folder.

    Example:
        >>> from sparsetrain.dispatch import Problem
        >>> tuner_for(torch.device("cpu")).choose(Problem("forward", (64, 64), 8, torch.float32), torch.device("cpu"))
        Choice(backend='masked', algorithm='')
    """
    if device.type != "cuda":
        return Tuner(DispatchTable(), describe_environment(device))
    return Tuner(
        DispatchTable(cache_folder() / "dispatch.json"), describe_environment(device), stopwatch=median_milliseconds
    )
