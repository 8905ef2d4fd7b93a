"""Masks by definition: kernels' references and loops, which use nothing of the code under test."""

import numpy as np
import torch
from torch import Tensor

from sparsetrain.kernels.mask_search.reference import search_row_wise, search_transposable
from sparsetrain.kernels.tile_codes.reference import unpack_codes


def brute_force_mask(scores: np.ndarray) -> np.ndarray:
    """Best 2:4 mask of a float64 matrix over the 90 patterns of every tile."""
    return unpack_codes(search_transposable(torch.from_numpy(scores))).numpy()


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest magnitudes of every four in a row."""
    return search_row_wise(weight.abs(), 2, 4)


def two_of_those(weight: Tensor, mask: Tensor) -> Tensor:
    """Of every four in a column, the two largest magnitudes that a mask keeps, by loops."""
    kept = torch.zeros_like(mask)
    for column in range(weight.shape[1]):
        entries, allowed = weight[:, column].abs().tolist(), mask[:, column].tolist()
        for top in range(0, weight.shape[0], 4):
            places = sorted((row for row in range(top, top + 4) if allowed[row]), key=lambda row: -entries[row])
            kept[places[:2], column] = True
    return kept
