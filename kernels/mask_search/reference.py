"""Exact transposable 2:4 search and row-wise N:M search in plain torch; the derivation is in this folder's README."""

import functools
import itertools

import torch
from torch import Tensor

NONFINITE_KEY = 2.0**100
"""Scores are clamped to ±2^100, so that sums of keys never overflow; NaN ranks as +2^100."""

PAIRINGS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
"""The three ways to split four rows into two pairs; the first row of a pair is its leader."""

LEADER_NIBBLES = (0b0011, 0b0101, 0b1001)
"""Columns kept by a leader whose difference is largest along axis h1, h2 or h3 with a positive sign."""

# A chunk's planes should stay in the second-level cache of a CPU; a GPU only needs its memory bounded.
_TILES_PER_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}


def ranking_keys(scores: Tensor) -> Tensor:
    """Clamp scores to the finite keys that the searches rank, in float32 (float64 stays float64).

    Args:
        scores: Any shape, any floating dtype.

    Returns:
        A new tensor of the same shape: values in [-2^100, 2^100], NaN replaced by 2^100.

    Example:
        >>> ranking_keys(torch.tensor([1.0, float("inf"), float("nan")])).tolist()[0]
        1.0
    """
    keys = torch.empty_like(scores, dtype=_key_dtype(scores), memory_format=torch.contiguous_format)
    return _clamp_(keys.copy_(scores))


@torch.no_grad()
def search_transposable(scores: Tensor) -> Tensor:
    """Return the tile codes of the best transposable 2:4 mask: the optimum over all 90 patterns of every 4×4 tile.

    Ties go to the first pairing of ``PAIRINGS``, the first axis, and the positive sign. Extra memory is bounded by
    one chunk of tiles.

    Args:
        scores: ``[O, I]``, any floating dtype and strides; O and I multiples of 4. Larger is kept; signs count.

    Returns:
        int16 ``[O/4, I/4]``; bit ``4*row + col`` is set where the entry is kept.

    Example:
        >>> tile = torch.tensor([[9.0, 8, 0, 0], [9, 8, 0, 0], [0, 0, 9, 8], [0, 0, 9, 8]])
        >>> hex(search_transposable(tile).item() & 0xFFFF)
        '0xcc33'
    """
    tile_rows, tile_columns = scores.shape[0] // 4, scores.shape[1] // 4
    codes = torch.empty(tile_rows, tile_columns, dtype=torch.int16, device=scores.device)
    if codes.numel() == 0:
        return codes
    tiles = torch.unflatten(torch.unflatten(scores, 1, (tile_columns, 4)), 0, (tile_rows, 4))  # [O/4, 4, I/4, 4]
    table = _code_table(scores.device)
    limit = _TILES_PER_CHUNK.get(scores.device.type, 1 << 22)
    rows = min(tile_rows, max(1, limit // tile_columns))
    columns = min(tile_columns, limit)
    workspaces: dict[tuple[int, int], _Workspace] = {}
    for top, left in itertools.product(range(0, tile_rows, rows), range(0, tile_columns, columns)):
        chunk = tiles[top : top + rows, :, left : left + columns]
        out = codes[top : top + rows, left : left + columns]
        size = (out.shape[0], out.shape[1])
        if size not in workspaces:
            workspaces[size] = _Workspace(*size, dtype=_key_dtype(scores), device=scores.device)
        out.copy_(workspaces[size].search(chunk, table))
    return codes


@torch.no_grad()
def search_row_wise(scores: Tensor, n: int, m: int) -> Tensor:
    """Return the mask of the n largest of every m consecutive entries of the last dimension.

    An entry's rank is the number of entries of its group that beat it; on ties the earlier entry wins.

    Args:
        scores: ``[..., I]``, any floating dtype; I a multiple of m.
        n: Entries to keep of each group, 0 to m.
        m: Size of a group.

    Returns:
        bool, same shape as ``scores``.

    Example:
        >>> search_row_wise(torch.tensor([3.0, 1, 2, 2]), 2, 4).tolist()
        [True, False, True, False]
    """
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    flat_scores, flat_mask = scores.reshape(-1, m), mask.view(-1, m)
    groups = _TILES_PER_CHUNK.get(scores.device.type, 1 << 22) * 16 // m
    for start in range(0, flat_scores.shape[0], max(1, groups)):
        keys = ranking_keys(flat_scores[start : start + groups].t())  # [m, groups]: one contiguous plane per position
        beaten_by = torch.zeros(keys.shape, dtype=torch.int16, device=keys.device)
        for earlier, later in itertools.combinations(range(m), 2):
            earlier_wins = keys[earlier] >= keys[later]
            beaten_by[later] += earlier_wins
            beaten_by[earlier] += ~earlier_wins
        flat_mask[start : start + groups] = (beaten_by < n).t()
    return mask


class _Workspace:
    """Buffers for one chunk of tiles, and the search that fills them in a fixed order of operations."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        def planes(*count: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(*count, rows, columns, dtype=kind, device=device)

        self.keys = planes(4, 4)  # [row, column]
        self.pair_sums, self.pair_differences = planes(4, 2), planes(4, 2)
        self.projections = planes(3, 4)  # [axis, row]: h_k · r_i
        self.differences = planes(3, 6)  # [axis, pair]; pairs 01 02 03 | 23 13 12
        self.gains = planes(6)
        self.totals = planes(3)
        self.negative = planes(3, 6, kind=torch.bool)
        self.later_axis = planes(2, 6, kind=torch.bool)
        self.later_pairing = planes(2, kind=torch.bool)
        self.index = planes(kind=torch.int32)
        self.codes = planes(kind=torch.int16)

    def search(self, tiles: Tensor, table: Tensor) -> Tensor:
        """Return int16 codes ``[rows, columns]`` for tiles ``[rows, 4, columns, 4]``."""
        _clamp_(self.keys.copy_(tiles.permute(1, 3, 0, 2)))
        self._project()
        self._rank_axes()
        leaders = self._choose_pairing()
        self.index.copy_(leaders[0])
        self.index.add_(leaders[1].to(torch.int32), alpha=32)
        second, third = self.later_pairing.view(torch.uint8)
        self.index.add_(second.bitwise_or_(third.mul_(2)).to(torch.int32), alpha=1024)
        torch.index_select(table, 0, self.index.view(-1), out=self.codes.view(-1))
        return self.codes

    def _project(self) -> None:
        """Dot every row with h1 = (1,1,-1,-1), h2 = (1,-1,1,-1), h3 = (1,-1,-1,1)."""
        torch.add(self.keys[:, 0::2], self.keys[:, 1::2], out=self.pair_sums)
        torch.sub(self.keys[:, 0::2], self.keys[:, 1::2], out=self.pair_differences)
        torch.sub(self.pair_sums[:, 0], self.pair_sums[:, 1], out=self.projections[0])
        torch.add(self.pair_differences[:, 0], self.pair_differences[:, 1], out=self.projections[1])
        torch.sub(self.pair_differences[:, 0], self.pair_differences[:, 1], out=self.projections[2])

    def _rank_axes(self) -> None:
        """For every pair of rows: the gain max_k |h_k · (r_i - r_j)| and five bits that say where it is attained."""
        rows, pairs = self.projections, self.differences
        torch.sub(rows[:, 0:1], rows[:, 1:4], out=pairs[:, 0:3])
        for pair, (i, j) in enumerate(((2, 3), (1, 3), (1, 2)), start=3):
            torch.sub(rows[:, i], rows[:, j], out=pairs[:, pair])
        torch.lt(pairs, 0, out=self.negative)
        pairs.abs_()
        torch.gt(pairs[1], pairs[0], out=self.later_axis[0])
        torch.maximum(pairs[0], pairs[1], out=self.gains)
        torch.gt(pairs[2], self.gains, out=self.later_axis[1])
        torch.maximum(self.gains, pairs[2], out=self.gains)
        bits = self.negative.view(torch.uint8)
        axes = self.later_axis.view(torch.uint8)
        bits[0].bitwise_or_(bits[1].mul_(2)).bitwise_or_(bits[2].mul_(4))
        bits[0].bitwise_or_(axes[0].mul_(8)).bitwise_or_(axes[1].mul_(16))

    def _choose_pairing(self) -> Tensor:
        """Return the bits of the two leaders of the best pairing, uint8 ``[2, rows, columns]``."""
        torch.add(self.gains[:3], self.gains[3:], out=self.totals)
        torch.gt(self.totals[1], self.totals[0], out=self.later_pairing[0])
        torch.maximum(self.totals[0], self.totals[1], out=self.totals[0])
        torch.gt(self.totals[2], self.totals[0], out=self.later_pairing[1])
        bits = torch.unflatten(self.negative.view(torch.uint8)[0], 0, (2, 3))  # [leader, pairing]
        chosen = bits[:, 0]
        for pairing in (1, 2):
            # torch.where is not vectorised for bytes on a CPU; xor-and-xor selects the same
            keep_new = self.later_pairing.view(torch.uint8)[pairing - 1] * 255
            chosen.bitwise_xor_((chosen ^ bits[:, pairing]).bitwise_and_(keep_new))
        return chosen


def _key_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _clamp_(keys: Tensor) -> Tensor:
    return keys.clamp_(-NONFINITE_KEY, NONFINITE_KEY).nan_to_num_(nan=NONFINITE_KEY)


@functools.cache
def _code_table(device: torch.device) -> Tensor:
    """Map 12 bits (five per leader, two for the pairing) to the 16-bit tile code."""
    codes = [_code(index & 31, (index >> 5) & 31, min(index >> 10, 2)) for index in range(4096)]
    return torch.tensor([code - (code >> 15 << 16) for code in codes], dtype=torch.int16, device=device)


def _code(first: int, second: int, pairing: int) -> int:
    code = 0
    for bits, (leader, partner) in zip((first, second), PAIRINGS[pairing], strict=True):
        axis = 2 if bits & 16 else (bits >> 3) & 1
        nibble = LEADER_NIBBLES[axis] ^ (0b1111 if bits >> axis & 1 else 0)
        code |= nibble << 4 * leader | (nibble ^ 0b1111) << 4 * partner
    return code
