"""Matmul backends: how products with a layer's masked weight run."""

from ..checks import one_of, require
from .cusparselt.backend import CuSparseLtBackend
from .cutlass import CutlassBackend
from .interface import Backend, Operand
from .masked import MaskedBackend
from .tilelang import TilelangBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CuSparseLtBackend(), CutlassBackend(), TilelangBackend(), MaskedBackend())
}
"""Backends by name, in the order in which a deterministic choice takes them."""


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


__all__ = [
    "BACKENDS", "Backend", "CuSparseLtBackend", "CutlassBackend", "MaskedBackend", "Operand", "TilelangBackend",
    "resolve_backend",
]  # fmt: skip
