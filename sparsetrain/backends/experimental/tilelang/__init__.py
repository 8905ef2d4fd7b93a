"""TileLang: products with a 2:4 matrix in natural order, compiled here, with an activation fused; experimental."""

from .backend import TilelangBackend
from .kernel import compile_kernel, cuda_source
from .tiles import Epilogue, KernelKey, Tile, tiles_for

__all__ = ["Epilogue", "KernelKey", "Tile", "TilelangBackend", "compile_kernel", "cuda_source", "tiles_for"]
