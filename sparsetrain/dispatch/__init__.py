"""Dispatch: the backend and algorithm of each product, benchmarked here, and the table that stores the choice."""

from .faults import DeviceFaultError
from .problem import MASKED, Choice, Problem, Product, bucket
from .table import Decision, DispatchTable
from .tuner import Tuner
from .tuners import describe_environment, tuner_for
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
]
