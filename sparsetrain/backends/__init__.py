"""Matmul backends: how products with a layer's masked weight run."""

from .cusparselt.backend import CuSparseLtBackend
from .cutlass import CutlassBackend
from .experimental.tilelang import TilelangBackend
from .interface import Backend, Operand
from .masked import MaskedBackend
from .registry import BACKENDS, resolve_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "CuSparseLtBackend",
    "CutlassBackend",
    "MaskedBackend",
    "Operand",
    "TilelangBackend",
    "resolve_backend",
]
