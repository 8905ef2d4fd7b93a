"""TileLang: products with a 2:4 matrix in natural order, compiled here, with an activation fused; experimental."""

from .backend import TilelangBackend
from .kernel import Epilogue, KernelKey, Tile, compile_kernel, cuda_source, tiles_for

__all__ = ["Epilogue", "KernelKey", "Tile", "TilelangBackend", "compile_kernel", "cuda_source", "tiles_for"]
