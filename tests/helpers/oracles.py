"""Masks by definition: brute force and loops, which use nothing of the code under test."""

import itertools

import numpy as np
import torch
from torch import Tensor

ROWS = [row for row in itertools.product([0, 1], repeat=4) if sum(row) == 2]
PATTERNS = np.array([p for p in itertools.product(ROWS, repeat=4) if (np.sum(p, axis=0) == 2).all()])  # [90, 4, 4]


def tiles_of(matrix: Tensor) -> Tensor:
    """``[O, I]`` to ``[tiles, 16]``."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)


def brute_force_sums(scores: Tensor) -> Tensor:
    """Largest kept sum of every tile over the 90 patterns, in float64."""
    patterns = torch.from_numpy(PATTERNS.reshape(90, 16)).double()
    return (tiles_of(scores.double()) @ patterns.T).amax(1)


def brute_force_mask(scores: np.ndarray) -> np.ndarray:
    """Best mask of a float64 matrix, one tile at a time."""
    mask = np.zeros(scores.shape, dtype=bool)
    for i, j in itertools.product(range(0, scores.shape[0], 4), range(0, scores.shape[1], 4)):
        sums = (PATTERNS * scores[i : i + 4, j : j + 4]).sum((1, 2))
        mask[i : i + 4, j : j + 4] = PATTERNS[sums.argmax()]
    return mask


def two_of_four(weight: Tensor) -> Tensor:
    """The two largest magnitudes of every four in a row, by loops."""
    kept = torch.zeros_like(weight, dtype=torch.bool)
    for row, entries in enumerate(weight.abs().tolist()):
        for left in range(0, len(entries), 4):
            order = sorted(range(left, left + 4), key=lambda place: -entries[place])
            kept[row, order[:2]] = True
    return kept


def two_of_those(weight: Tensor, mask: Tensor) -> Tensor:
    """Of every four in a column, the two largest magnitudes that a mask keeps, by loops."""
    kept = torch.zeros_like(mask)
    for column in range(weight.shape[1]):
        entries, allowed = weight[:, column].abs().tolist(), mask[:, column].tolist()
        for top in range(0, weight.shape[0], 4):
            places = sorted((row for row in range(top, top + 4) if allowed[row]), key=lambda row: -entries[row])
            kept[places[:2], column] = True
    return kept
