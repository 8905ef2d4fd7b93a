"""A canary for each private name of torch: what is relied on, where torch has it, and what breaks here without it.

They try torch itself, so that a name that has gone fails its own canary, however much else it breaks. A module holds
those of an area; it is imported here.
"""

from . import cuda_and_operators, distributed, modules, operations, optimizers, tensors
from .registry import CANARIES

__all__ = ["CANARIES", "cuda_and_operators", "distributed", "modules", "operations", "optimizers", "tensors"]
