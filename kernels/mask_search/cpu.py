"""Exact transposable 2:4 search and row-wise N:M search in planes that fit a CPU's caches; the README derives them."""

import itertools
import threading
from typing import Any

import torch
from torch import Tensor

from .reference import NONFINITE_KEY, PAIRINGS

# A code is c - n0*a - n1*b for the leaders' nibbles n0 and n1, as n << x | (15 - n) << y is (15 << y) - n*((1 << y) -
# (1 << x)). One row of (a, b, c) for each pairing.
_CODE_TERMS = tuple(
    (
        *((1 << 4 * partner) - (1 << 4 * leader) for leader, partner in pairs),
        sum(15 << 4 * partner for _, partner in pairs),
    )
    for pairs in PAIRINGS
)

# A chunk's planes should stay in the second-level cache of a CPU; a GPU only needs its memory bounded.
_TILES_PER_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}


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
def search_transposable(scores: Tensor, magnitude: bool = False) -> Tensor:
    """Return the tile codes of the best transposable 2:4 mask: the optimum over all 90 patterns of every 4×4 tile.

    Ties go to the first pairing of ``PAIRINGS``; then a leader prefers a whole half, and the left column. Extra memory
    is bounded by one chunk of tiles.

    Args:
        scores: ``[O, I]``, any floating dtype and strides; O and I multiples of 4. Larger is kept; signs count.
        magnitude: Rank by ``|score|``, without a copy of the scores.

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
    limit = _TILES_PER_CHUNK.get(scores.device.type, 1 << 22)
    rows = min(tile_rows, max(1, limit // tile_columns))
    columns = min(tile_columns, limit)
    for top, left in itertools.product(range(0, tile_rows, rows), range(0, tile_columns, columns)):
        chunk = tiles[top : top + rows, :, left : left + columns]
        out = codes[top : top + rows, left : left + columns]
        workspace = _workspace(out.shape[0], out.shape[1], _key_dtype(scores), scores.device)
        out.copy_(workspace.search(chunk, magnitude))
    return codes


@torch.no_grad()
def search_row_wise(scores: Tensor, n: int, m: int) -> Tensor:
    """Return what :func:`.reference.search_row_wise` returns: an entry's rank is the number of its group that beat it.

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
    """Buffers for one chunk of tiles, and the search that fills them in a fixed order of operations.

    Comparisons and selections run on the keys' bits: non-negative floats order as integers, ``x >> 31`` of a difference
    is -1 where it is negative and 0 elsewhere, and a product with it selects. Torch's ``where`` and comparisons of
    floats are several times slower on a CPU.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.bits = torch.int64 if dtype == torch.float64 else torch.int32
        self.sign = 63 if dtype == torch.float64 else 31

        def planes(count: int) -> Tensor:
            # rows outermost in memory: two threads that halve an operation keep to their own rows, whatever the planes
            return torch.empty(rows, count, columns, dtype=dtype, device=device).transpose(0, 1)

        self.limit = torch.tensor(NONFINITE_KEY, dtype=dtype).view(self.bits).item()
        # what a later stage writes shares memory with what it no longer needs: less to keep in the caches
        first, last = planes(24), planes(18)
        self.keys = torch.unflatten(first[:16], 0, (4, 4))  # [row, column]
        self.sums = torch.unflatten(first[16:], 0, (4, 2))  # [row, half]: both columns of a half
        self.contrasts = torch.unflatten(
            planes(12), 0, (3, 4)
        )  # [contrast, row]: half against half, left column against right of either half
        self.differences = torch.unflatten(last, 0, (3, 6))  # [contrast, pair]; pairs 01 02 03 | 23 13 12
        self.magnitudes = torch.unflatten(first[:18], 0, (3, 6))
        self.totals = first[18:21]  # [pairing]
        self.best_total = first[21]
        chosen = self.contrasts.view(self.bits)
        self.second, self.third = chosen[0, 0], chosen[0, 1]  # masks: that pairing is better
        self.leaders = torch.unflatten(chosen.flatten(0, 1)[2:8], 0, (3, 2))  # [contrast, pair]
        self.scratch = torch.unflatten(first[:6].view(self.bits), 0, (3, 2))
        self.factors, self.spare = last[:3].view(self.bits), last[3:6].view(self.bits)
        self.by_pairing = [torch.tensor(row, dtype=self.bits, device=device).view(3, 1, 1) for row in _CODE_TERMS]

    def search(self, tiles: Tensor, magnitude: bool) -> Tensor:
        """Return integer codes ``[rows, columns]`` for tiles ``[rows, 4, columns, 4]``."""
        plain = self._are_plain(tiles, magnitude)
        self.keys.copy_(tiles.permute(1, 3, 0, 2))
        if magnitude:
            self.keys.abs_()
        if not plain:
            _clamp_(self.keys)
        self._contrast_rows()
        self._choose_pairing()
        return self._assemble(self._leader_nibbles())

    def _are_plain(self, tiles: Tensor, magnitude: bool) -> bool:
        """Whether clamping would change nothing: no score is NaN, beyond the limit, or (without magnitude) signed."""
        if tiles.dtype != self.keys.dtype or tiles.device.type != "cpu":
            return False
        low, high = (tiles if magnitude else tiles.view(self.bits)).aminmax()
        limit = NONFINITE_KEY if magnitude else self.limit
        return bool(low.item() >= (-limit if magnitude else 0) and high.item() <= limit)

    def _contrast_rows(self) -> None:
        """Fill the differences of every pair of rows in the three contrasts."""
        keys, rows, pairs = self.keys, self.contrasts, self.differences
        torch.add(keys[:, 0::2], keys[:, 1::2], out=self.sums)
        torch.sub(self.sums[:, 0], self.sums[:, 1], out=rows[0])
        torch.sub(keys[:, 0], keys[:, 1], out=rows[1])
        torch.sub(keys[:, 2], keys[:, 3], out=rows[2])
        torch.sub(rows[:, 0:1], rows[:, 1:4], out=pairs[:, 0:3])
        for pair, (i, j) in enumerate(((2, 3), (1, 3), (1, 2)), start=3):
            torch.sub(rows[:, i], rows[:, j], out=pairs[:, pair])

    def _choose_pairing(self) -> None:
        """Rank the pairings, and select the signed differences of the best one's two leaders."""
        halves, left, right = torch.abs(self.differences, out=self.magnitudes)
        gains = torch.maximum(halves, left.add_(right), out=halves)
        torch.add(gains[:3], gains[3:], out=self.totals)
        totals, best = self.totals.view(self.bits), self.best_total.view(self.bits)
        torch.sub(totals[0], totals[1], out=self.second).bitwise_right_shift_(self.sign)
        torch.maximum(self.totals[0], self.totals[1], out=self.best_total)
        torch.sub(best, totals[2], out=self.third).bitwise_right_shift_(self.sign)
        pairs = torch.unflatten(self.differences.view(self.bits), 1, (2, 3))  # [contrast, leader, pairing]
        _select(pairs[:, :, 0], pairs[:, :, 1], self.second, out=self.leaders)
        _select(self.leaders, pairs[:, :, 2], self.third, out=self.leaders, spare=self.scratch)

    def _leader_nibbles(self) -> Tensor:
        """Return the columns that the two leaders keep, as integers ``[2, rows, columns]``."""
        magnitudes, signs = self.scratch, self.leaders
        _, left, right = torch.abs(signs.view(self.keys.dtype), out=magnitudes.view(self.keys.dtype))
        left.add_(right)
        signs.bitwise_right_shift_(self.sign)
        split: Tensor = magnitudes.view(self.keys.dtype)[0].sub_(left).view(self.bits).bitwise_right_shift_(self.sign)
        # 0011 or 1100 for a half; 0101 with the columns of a half exchanged where the right one is better
        whole: Tensor = signs[0].bitwise_and_(0b1111)
        each = signs[1].bitwise_and_(0b0011).bitwise_or_(signs[2].bitwise_and_(0b1100)).bitwise_xor_(0b0110)
        return whole.bitwise_xor_(each.bitwise_xor_(whole).bitwise_and_(split)).bitwise_xor_(0b0011)

    def _assemble(self, nibbles: Tensor) -> Tensor:
        """Return the codes: a leader's nibble n and its partner's 15 - n, at the bits of their rows."""
        first, second, third = self.by_pairing
        terms = torch.addcmul(first, self.second, second - first, value=-1, out=self.factors)
        _select(terms, third, self.third, out=terms, spare=self.spare)
        codes = terms[2].sub_(nibbles[0].mul_(terms[0]))
        return codes.sub_(nibbles[1].mul_(terms[1]))


_kept = threading.local()


def _workspace(*key: Any) -> _Workspace:
    """Return a workspace; a CPU thread keeps its last one, as new memory costs a third of the search in page faults."""
    if key[-1].type != "cpu":
        return _Workspace(*key)
    if getattr(_kept, "key", None) != key:
        _kept.key, _kept.workspace = key, _Workspace(*key)
    workspace: _Workspace = _kept.workspace
    return workspace


def _select(old: Tensor, new: Tensor, take_new: Tensor, out: Tensor, spare: Tensor | None = None) -> Tensor:
    """Write ``new`` where the mask is all ones, else ``old``; ``spare`` is overwritten, and needed if out is old."""
    # as integers, which wrap: old - mask * (new - old) with a mask of -1 or 0
    difference = torch.sub(new, old, out=out if spare is None else spare)
    return torch.addcmul(old, take_new, difference, value=-1, out=out)


def _key_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _clamp_(keys: Tensor) -> Tensor:
    # adding zero turns -0 into +0, so that no difference of keys is -0 and sign bits are signs
    return keys.clamp_(-NONFINITE_KEY, NONFINITE_KEY).nan_to_num_(nan=NONFINITE_KEY).add_(0.0)
