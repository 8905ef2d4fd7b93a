"""Backends by name, in the order in which a deterministic choice takes them."""

from ..checks.rules import one_of, require
from ..hardware.requirements import PREFERENCE
from .cusparselt.backend import CuSparseLtBackend
from .cutlass import CutlassBackend
from .experimental.tilelang import TilelangBackend
from .interface import Backend
from .masked import MaskedBackend

_ALL: tuple[Backend, ...] = (CuSparseLtBackend(), CutlassBackend(), TilelangBackend(), MaskedBackend())

BACKENDS: dict[str, Backend] = {each.name: each for each in sorted(_ALL, key=lambda each: PREFERENCE.index(each.name))}
"""Backends by name, in the order of ``PREFERENCE``."""


def resolve_backend(name: str) -> str:
    """Return the name of a backend, or ``"auto"``, if there is one of that name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> resolve_backend("auto")
        'auto'
    """
    require("backend", name, one_of(["auto", *sorted(BACKENDS)]))
    return name
