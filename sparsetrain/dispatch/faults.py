"""Faults: algorithms after which a process cannot use its device any more, and what is remembered of them."""

from collections.abc import Mapping

import torch

from .problem import MASKED, Choice
from .table import Decision, DispatchTable

FAULTS = "every problem"
"""The key under which a table holds algorithms that fault: they are left out whatever the problem."""


class DeviceFaultError(RuntimeError):
    """An algorithm that made the device unusable for its process; a new process leaves it out."""


def known_faults(table: DispatchTable, environment: str) -> Mapping[str, str]:
    """Return the algorithms that are known to fault in an environment, with the reason.

    Example:
        >>> dict(known_faults(DispatchTable(), "some GPU"))
        {}
    """
    decision = table.find(environment, FAULTS)
    return {} if decision is None else decision.denied


def record_fault(table: DispatchTable, environment: str, choice: Choice, reason: str) -> None:
    """Remember that an algorithm faults in an environment.

    Example:
        >>> table = DispatchTable()
        >>> record_fault(table, "some GPU", Choice("cusparselt", "7"), "illegal memory access")
        >>> dict(known_faults(table, "some GPU"))
        {'cusparselt:7': 'illegal memory access'}
    """
    faults = {**known_faults(table, environment), str(choice): reason}
    table.record(environment, FAULTS, Decision(str(MASKED), {}, faults))


def device_works(device: torch.device) -> bool:
    """Say whether a device still computes for this process; after a fault, every call on it fails.

    Example:
        >>> device_works(torch.device("cpu"))
        True
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return float(torch.ones((), device=device) + 1) == 2.0
    except torch.OutOfMemoryError:
        return True
    except Exception:  # torch.AcceleratorError, or RuntimeError: by version
        return False
