"""cuSPARSELt: products with a 2:4 matrix on sparse tensor cores, with cached plans; needs the extra ``cuda``."""

from .library import CudaDevices, Devices, Library, Order
from .plans import Algorithm, PlanKey
from .session import Session
from .session_pool import CuSparseLt, default

__all__ = [
    "Algorithm",
    "CuSparseLt",
    "CudaDevices",
    "Devices",
    "Library",
    "Order",
    "PlanKey",
    "Session",
    "default",
]
