import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import PATTERNS, brute_force_sums, tiles_of

from sparsetrain.kernels.mask_search import reference
from sparsetrain.kernels.mask_search.reference import NONFINITE_KEY, ranking_keys, search_row_wise, search_transposable
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


def assert_optimal(scores: torch.Tensor) -> None:
    mask = unpack_codes(search_transposable(scores))
    tiles = tiles_of(mask.double()).view(-1, 4, 4)
    assert (tiles.sum(1) == 2).all()
    assert (tiles.sum(2) == 2).all()
    keys = ranking_keys(scores).double()
    kept = (tiles_of(keys) * tiles_of(mask.double())).sum(1)
    best = brute_force_sums(keys)
    scale = tiles_of(keys).abs().sum(1)
    assert (kept >= best - 1e-6 * scale).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_search_equals_brute_force_over_the_90_patterns(name: str, dtype: torch.dtype) -> None:
    for shape in [(64, 96), (4, 4), (12, 20), (1028, 36)]:
        assert_optimal(DISTRIBUTIONS[name](shape).to(dtype))


def test_search_finds_the_unique_best_pattern_exactly() -> None:
    scores = torch.randn(128, 128, dtype=torch.float64)
    sums = tiles_of(scores) @ torch.from_numpy(PATTERNS.reshape(90, 16)).double().T
    best = torch.from_numpy(PATTERNS.reshape(90, 16))[sums.argmax(1)]
    assert torch.equal(tiles_of(unpack_codes(search_transposable(scores))).long(), best.long())


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (8, 8), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_any_float_gives_an_optimal_valid_mask(scores: np.ndarray) -> None:
    assert_optimal(torch.from_numpy(scores))


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int8, (4, 4), elements=st.integers(-2, 2)))
def test_small_integers_with_many_ties_are_optimal(scores: np.ndarray) -> None:
    assert_optimal(torch.from_numpy(scores).float())


def test_every_one_of_the_90_patterns_is_found() -> None:
    tiles = torch.from_numpy(PATTERNS).float()
    found = unpack_codes(search_transposable(tiles.reshape(-1, 4)))
    assert torch.equal(found.view(90, 4, 4).float(), tiles)


def test_every_pattern_splits_into_two_pairs_of_complementary_rows() -> None:
    for pattern in PATTERNS:
        assert any(all((pattern[i] + pattern[j] == 1).all() for i, j in pairing) for pairing in reference.PAIRINGS)


def test_ties_follow_the_documented_order() -> None:
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
        assert f"{search_transposable(scores).item() & 0xFFFF:04x}" == code


def test_zeros_of_either_sign_are_the_same_score() -> None:
    scores = torch.randint(-1, 2, (32, 32)).float()
    signed = torch.where((scores == 0) & (torch.rand(32, 32) < 0.5), -0.0, scores)
    assert torch.equal(search_transposable(signed), search_transposable(scores))


@pytest.mark.parametrize("limit", [1, 3, 7, 64])
def test_chunks_do_not_change_the_result(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randint(0, 4, (52, 44)).float()
    whole, rows = search_transposable(scores), search_row_wise(scores, 2, 4)
    monkeypatch.setattr(reference, "_TILES_PER_CHUNK", {"cpu": limit})
    assert torch.equal(search_transposable(scores), whole)
    assert torch.equal(search_row_wise(scores, 2, 4), rows)


def test_strided_and_transposed_inputs_are_read_correctly_and_left_alone() -> None:
    base = torch.randn(64, 128)
    before = base.clone()
    for view in (base[::2], base[:, ::4], base.t(), base[4:60, 8:120]):
        assert torch.equal(search_transposable(view), search_transposable(view.contiguous()))
    assert torch.equal(base, before)


def test_non_finite_scores_are_ranked_at_the_ends() -> None:
    keys = ranking_keys(torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]))
    assert keys.tolist() == [NONFINITE_KEY, NONFINITE_KEY, -NONFINITE_KEY, 1.0]
    tile = torch.rand(4, 4)
    tile[1, 2] = float("nan")
    tile[3, 0] = -float("inf")
    mask = unpack_codes(search_transposable(tile))
    assert mask[1, 2]
    assert not mask[3, 0]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (1, 4), (3, 4), (4, 8), (0, 4), (4, 4), (2, 16)])
def test_row_wise_search_equals_a_stable_sort(n: int, m: int) -> None:
    for scores in (torch.randn(24, 32), torch.randint(0, 3, (24, 32)).float(), torch.zeros(4, 32)):
        order = scores.view(-1, m).sort(dim=1, descending=True, stable=True).indices
        expected = torch.zeros(scores.numel() // m, m, dtype=torch.bool).scatter_(1, order[:, :n], True)
        assert torch.equal(search_row_wise(scores, n, m), expected.view(24 if scores.shape[0] == 24 else 4, 32))


def test_transposing_the_weight_gives_a_mask_of_the_same_sum() -> None:
    scores = torch.randn(64, 64)
    mask, transposed = unpack_codes(search_transposable(scores)), unpack_codes(search_transposable(scores.t()))
    torch.testing.assert_close((scores * mask).sum(), (scores.t() * transposed).sum())
    assert torch.equal(mask, transposed.t())  # no ties in Gaussian float32 scores


def test_an_empty_weight_has_empty_codes() -> None:
    for shape, expected in (((0, 8), (0, 2)), ((8, 0), (2, 0))):
        assert tuple(search_transposable(torch.empty(shape)).shape) == expected


def test_pairings_cover_all_splits_of_four_rows() -> None:
    assert {frozenset(map(frozenset, pairing)) for pairing in reference.PAIRINGS} == {
        frozenset({frozenset(pair), frozenset(range(4)) - frozenset(pair)})
        for pair in itertools.combinations(range(4), 2)
    }
