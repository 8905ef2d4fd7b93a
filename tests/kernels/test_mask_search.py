"""The searches of the CPU against their definitions: the 90 and the 24 patterns of a tile, and a stable sort."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from sparsetrain.kernels.mask_search import cpu, reference
from sparsetrain.kernels.mask_search.cpu import ranking_keys, search_row_wise, search_transposable
from sparsetrain.kernels.mask_search.cpu_permutations import search_permutations
from sparsetrain.kernels.mask_search.reference import NONFINITE_KEY, PAIRINGS, patterns
from sparsetrain.kernels.tile_codes.reference import unpack_codes


def _nonfinite(shape: tuple[int, int]) -> torch.Tensor:
    scores = torch.randn(shape)
    draw = torch.rand(shape)
    scores[draw < 0.05], scores[(draw > 0.05) & (draw < 0.1)] = float("nan"), float("inf")
    scores[(draw > 0.1) & (draw < 0.15)] = float("-inf")
    return scores


DISTRIBUTIONS = {
    "gaussian magnitude": lambda shape: torch.randn(shape).abs(),
    "signed gaussian": torch.randn,
    "uniform": torch.rand,
    "heavy tails": lambda shape: torch.randn(shape) ** 9,
    "ties": lambda shape: torch.randint(0, 3, shape).float(),
    "signed ties": lambda shape: torch.randint(-1, 2, shape).float(),
    "zeros": torch.zeros,
    "negative": lambda shape: -torch.rand(shape) - 1,
    "tiny": lambda shape: torch.randn(shape) * 1e-38,
    "huge": lambda shape: torch.randn(shape) * 1e38,
    "nan and inf": _nonfinite,
}
EXACT = ("ties", "signed ties", "zeros")
"""Whose sums no rounding changes, so that ties are ties in every arithmetic."""
SEARCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "cpu": search_transposable,
    "reference": reference.search_transposable,
}


def assert_optimal(scores: Tensor) -> None:
    mask, best = unpack_codes(search_transposable(scores)), unpack_codes(reference.search_transposable(scores))
    assert (mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
    keys = reference.ranking_keys(scores).double()
    kept, most, scale = (sums_of_tiles(entries) for entries in (keys * mask, keys * best, keys.abs()))
    assert (kept >= most - 1e-6 * scale).all()


def sums_of_tiles(matrix: Tensor) -> Tensor:
    return matrix.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).sum((1, 3))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_search_equals_brute_force_over_the_90_patterns(name: str, dtype: torch.dtype) -> None:
    for shape in [(64, 96), (4, 4), (12, 20), (1028, 36)]:
        scores = DISTRIBUTIONS[name](shape).to(dtype)
        assert_optimal(scores)
        if name in EXACT:
            for magnitude in (False, True):
                expected = reference.search_transposable(scores, magnitude)
                assert torch.equal(search_transposable(scores, magnitude), expected)


def test_search_finds_the_unique_best_pattern_exactly() -> None:
    for scores in (torch.randn(128, 128, dtype=torch.float64), torch.randn(128, 128, dtype=torch.float64) ** 3):
        for magnitude in (False, True):
            expected = reference.search_transposable(scores, magnitude)
            assert torch.equal(search_transposable(scores, magnitude), expected)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (8, 8), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_any_float_gives_an_optimal_valid_mask(scores: np.ndarray) -> None:
    assert_optimal(torch.from_numpy(scores))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int8, (4, 4), elements=st.integers(-2, 2)))
def test_small_integers_with_many_ties_give_the_codes_of_the_reference(scores: np.ndarray) -> None:
    tile = torch.from_numpy(scores).float()
    assert torch.equal(search_transposable(tile), reference.search_transposable(tile))
    for n in (1, 3):
        assert torch.equal(search_permutations(tile, n), reference.search_transposable(tile, n=n))


def test_every_one_of_the_90_patterns_is_found() -> None:
    tiles = patterns(2).float()
    found = unpack_codes(search_transposable(tiles.reshape(-1, 4)))
    assert torch.equal(found.view(90, 4, 4).float(), tiles)


def test_every_pattern_splits_into_two_pairs_of_complementary_rows() -> None:
    for pattern in patterns(2):
        assert any(all((pattern[i] ^ pattern[j]).all() for i, j in pairing) for pairing in PAIRINGS)


@pytest.mark.parametrize(("n", "count"), [(1, 24), (2, 90), (3, 24)])
def test_patterns_are_all_grids_that_keep_n_of_every_line(n: int, count: int) -> None:
    codes = torch.arange(-(2**15), 2**15).to(torch.int16)
    grids = unpack_codes(codes[:, None, None])
    every = grids[((grids.sum(1) == n) & (grids.sum(2) == n)).all(1)]
    assert len(every) == len(patterns(n)) == count
    assert {tuple(grid.flatten().tolist()) for grid in every} == {
        tuple(grid.flatten().tolist()) for grid in patterns(n)
    }


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_ties_follow_the_documented_order(search: Callable[[Tensor], Tensor]) -> None:
    corner = torch.zeros(4, 4)
    corner[0, 3] = 1
    left = torch.zeros(4, 4)
    left[0, 0], left[0, 1], left[0, 2], left[0, 3] = 2, 1, 2, 1
    expected = {
        "c3c3": torch.ones(4, 4),  # the first pairing, whole halves, columns 01 for the leader
        "c33c": corner,  # columns 23 or one of each half are as good for row 0: the whole half
        "c3a5": left,  # one of each half is best for row 0; rows 2 and 3 are free
    }
    for code, scores in expected.items():
        assert f"{search(scores).item() & 0xFFFF:04x}" == code


def test_zeros_of_either_sign_are_the_same_score() -> None:
    scores = torch.randint(-1, 2, (32, 32)).float()
    signed = torch.where((scores == 0) & (torch.rand(32, 32) < 0.5), -0.0, scores)
    assert torch.equal(search_transposable(signed), search_transposable(scores))


@pytest.mark.parametrize("limit", [1, 3, 7, 64])
def test_chunks_do_not_change_the_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(0, 4, (52, 44)).float()
    whole, rows = search_transposable(scores), search_row_wise(scores, 2, 4)
    monkeypatch.setattr(cpu, "_TILES_PER_CHUNK", {"cpu": limit})
    assert torch.equal(search_transposable(scores), whole)
    assert torch.equal(search_row_wise(scores, 2, 4), rows)


def test_strided_and_transposed_inputs_are_read_correctly_and_left_alone() -> None:
    base = torch.randn(64, 128)
    before = base.clone()
    for view in (base[::2], base[:, ::4], base.t(), base[4:60, 8:120]):
        assert torch.equal(search_transposable(view), search_transposable(view.contiguous()))
    assert torch.equal(base, before)


def test_non_finite_scores_are_ranked_at_the_ends() -> None:
    for keys_of in (ranking_keys, reference.ranking_keys):
        keys = keys_of(torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]))
        assert keys.tolist() == [NONFINITE_KEY, NONFINITE_KEY, -NONFINITE_KEY, 1.0]
    tile = torch.rand(4, 4)
    tile[1, 2] = float("nan")
    tile[3, 0] = -float("inf")
    for search in SEARCHES.values():
        mask = unpack_codes(search(tile))
        assert mask[1, 2]
        assert not mask[3, 0]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4), (4, 8), (0, 4), (4, 4), (2, 16)])
def test_row_wise_search_equals_a_stable_sort(n: int, m: int) -> None:
    for scores in (torch.randn(24, 32), torch.randint(0, 3, (24, 32)).float(), torch.zeros(4, 32), _nonfinite((8, 32))):
        assert torch.equal(search_row_wise(scores, n, m), reference.search_row_wise(scores, n, m))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_permutations_equal_the_24_patterns(name: str, n: int) -> None:
    scores = DISTRIBUTIONS[name]((36, 20))
    keys = reference.ranking_keys(scores).double()
    found, best = search_permutations(scores, n), reference.search_transposable(scores, n=n)
    kept, most = (sums_of_tiles(keys * unpack_codes(codes)) for codes in (found, best))
    assert (kept >= most - 1e-6 * sums_of_tiles(keys.abs())).all()
    if name in EXACT:
        assert torch.equal(found, best)


def test_transposing_the_weight_gives_a_mask_of_the_same_sum() -> None:
    scores = torch.randn(64, 64)
    mask, transposed = unpack_codes(search_transposable(scores)), unpack_codes(search_transposable(scores.t()))
    torch.testing.assert_close((scores * mask).sum(), (scores.t() * transposed).sum())
    assert torch.equal(mask, transposed.t())  # no ties in Gaussian float32 scores


def test_an_empty_weight_has_empty_codes() -> None:
    for shape, expected in (((0, 8), (0, 2)), ((8, 0), (2, 0))):
        for search in SEARCHES.values():
            assert tuple(search(torch.empty(shape)).shape) == expected


def test_pairings_cover_all_splits_of_four_rows() -> None:
    assert {frozenset(map(frozenset, pairing)) for pairing in PAIRINGS} == {
        frozenset({frozenset(pair), frozenset(range(4)) - frozenset(pair)})
        for pair in itertools.combinations(range(4), 2)
    }
