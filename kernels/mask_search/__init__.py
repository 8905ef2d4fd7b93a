"""Mask search: scores in, tile codes or row-wise masks out."""

from .reference import NONFINITE_KEY, ranking_keys, search_row_wise, search_transposable

__all__ = ["NONFINITE_KEY", "ranking_keys", "search_row_wise", "search_transposable"]
