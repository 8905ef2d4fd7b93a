import itertools

import pytest
import torch

import sparsetrain as st


def test_masks_of_batches_are_masks_of_their_matrices() -> None:
    scores = torch.randn(2, 3, 8, 12)
    mask = st.transposable_mask(scores)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert torch.equal(mask[1, 2], st.transposable_mask(scores[1, 2]))
    assert st.is_transposable(mask)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_and_three_of_four_are_the_optimum_of_all_their_patterns(n: int, dtype: torch.dtype) -> None:
    rows = [row for row in itertools.product([0, 1], repeat=4) if sum(row) == n]
    patterns = [
        p for p in itertools.product(rows, repeat=4) if all(sum(column) == n for column in zip(*p, strict=True))
    ]
    assert len(patterns) == 24
    scores = torch.randn(3, 8, 12).to(dtype)
    mask = st.transposable_mask(scores, n)
    assert st.is_transposable(mask, n)
    assert not st.is_transposable(mask)
    assert torch.equal(st.decode_tiles(st.transposable_codes(scores, n)), mask)
    tiles = scores.double().unflatten(2, (3, 4)).unflatten(1, (2, 4)).transpose(2, 3)  # [3, 2, 3, 4, 4]
    sums = torch.einsum("abcrk,prk->abcp", tiles, torch.tensor(patterns, dtype=torch.float64))
    kept = (scores.double() * mask).unflatten(2, (3, 4)).unflatten(1, (2, 4)).sum((2, 4))
    torch.testing.assert_close(kept, sums.amax(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [1, 3])
def test_one_and_three_of_four_are_valid_whatever_the_scores(n: int) -> None:
    scores = torch.randn(8, 8)
    scores[0], scores[1], scores[2, ::2] = float("nan"), float("inf"), float("-inf")
    assert st.is_transposable(st.transposable_mask(scores, n), n)
    constant = st.transposable_mask(torch.zeros(4, 4), n)  # a tie: the first permutation is kept, or pruned
    assert torch.equal(constant, torch.eye(4, dtype=torch.bool) ^ (n == 3))


def test_scores_are_not_weights() -> None:
    negative = -torch.tensor([[4.0, 3, 2, 1]] * 4)
    kept = (negative * st.transposable_mask(negative)).sum()
    assert kept == -20  # every row and column keeps two, whatever the signs
    signed = torch.tensor([[4.0, 3, -9, -8], [-9, -8, 4, 3], [4, 3, -9, -8], [-9, -8, 4, 3]])
    assert (signed[st.transposable_mask(signed)] > 0).all()


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_nm_masks_lie_along_the_dimension_that_is_asked_for(dim: int) -> None:
    scores = torch.randn(8, 12)
    mask = st.nm_mask(scores, 2, 4, dim)
    assert st.is_nm(mask, 2, 4, dim)
    assert not st.is_nm(mask, 2, 4, 1 - dim % 2)


def test_predicates_reject_one_wrong_entry() -> None:
    mask = st.transposable_mask(torch.randn(8, 8))
    assert st.is_transposable(mask)
    mask[3, 5] ^= True
    assert not st.is_transposable(mask)
    assert not st.is_nm(mask)
    row_wise = st.nm_mask(torch.randn(64, 64))
    assert st.is_nm(row_wise)
    assert not st.is_transposable(row_wise)


def test_tile_codes_round_trip_and_count_flips() -> None:
    old, new = st.transposable_mask(torch.randn(16, 24)), st.transposable_mask(torch.randn(16, 24))
    codes = st.encode_tiles(old)
    assert codes.dtype == torch.int16
    assert torch.equal(st.decode_tiles(codes), old)
    assert torch.equal(st.decode_tiles(st.transpose_tiles(codes)), old.t())
    assert st.count_flips(codes, st.encode_tiles(new)).item() == (old ^ new).sum().item()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: st.transposable_mask(torch.randn(6, 8)), ValueError, ["(6, 8)", "multiples of 4"]),
        (lambda: st.transposable_mask(torch.randn(8)), ValueError, ["(8,)", "multiples of 4"]),
        (lambda: st.transposable_mask(torch.ones(8, 8, dtype=torch.int32)), TypeError, ["int32", "floating"]),
        (lambda: st.transposable_mask(torch.randn(8, 8), 4), ValueError, ["n is 4", "1, 2 or 3"]),
        (lambda: st.nm_mask(torch.randn(8, 6)), ValueError, ["(8, 6)", "m = 4"]),
        (lambda: st.nm_mask(torch.randn(8, 8), 5, 4), ValueError, ["5:4", "between 0 and m"]),
        (lambda: st.nm_mask(torch.randn(8, 8), dim=2), ValueError, ["dim is 2", "(8, 8)"]),
        (lambda: st.is_transposable(torch.randn(8, 8)), TypeError, ["float32", "bool"]),
        (lambda: st.encode_tiles(torch.ones(8, 8)), TypeError, ["float32", "bool"]),
        (lambda: st.decode_tiles(torch.ones(2, 2)), TypeError, ["float32", "int16"]),
        (
            lambda: st.count_flips(torch.zeros(2, 2, dtype=torch.int16), torch.zeros(2, 3, dtype=torch.int16)),
            ValueError,
            ["(2, 3)", "(2, 2)"],
        ),
    ],
)
def test_a_wrong_argument_is_named_in_one_sentence(call, error, words) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
