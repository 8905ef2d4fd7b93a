"""Unbiased 2:4 estimate of a gradient along the tokens: gradient in, packed operand of its transpose out."""

from .operator import mvue
from .reference import ESTIMATORS, dense_estimate, draw_exact, draw_two, estimate, philox

__all__ = ["ESTIMATORS", "dense_estimate", "draw_exact", "draw_two", "estimate", "mvue", "philox"]
