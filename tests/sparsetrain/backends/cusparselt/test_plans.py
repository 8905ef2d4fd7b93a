"""Plans and algorithms of the wrapper of cuSPARSELt: when they are made, kept and destroyed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cusparselt_bench import Bench, C, N, R, assert_close, expected, in_columns, normal, sparse

from sparsetrain.backends.cusparselt import Algorithm


def test_a_second_call_makes_one_library_call(bench: Bench) -> None:
    compressed, dense, bias = bench.lt.compress(sparse()), normal(C, N), normal(R)
    bench.lt.multiply(compressed, (R, C), dense, bias=bias)
    before = bench.fake.calls.copy()
    other = normal(C, N, seed=9)
    bench.lt.multiply(compressed, (R, C), other, bias=bias)
    assert bench.fake.calls - before == {"matmul": 1}
    before = bench.fake.calls.copy()
    bench.lt.compress(sparse())
    assert bench.fake.calls - before == {"sp_mma_compress2": 1}


@pytest.mark.parametrize("change", ["n", "order", "leading", "bias", "moved bias", "output", "algorithm"])
def test_what_a_plan_depends_on_gets_another_plan(bench: Bench, change: str) -> None:
    a, bias, moved = sparse(), normal(R), normal(R, seed=7)
    compressed, dense = bench.lt.compress(a), normal(C, N)
    bench.lt.multiply(compressed, (R, C), dense, bias=bias)
    arguments: dict[str, Any] = {"dense": dense, "bias": bias}
    arguments |= {  # type: ignore[call-overload]
        "n": {"dense": normal(C, N + 8)},
        "order": {"dense": in_columns(dense, C)},
        "leading": {"dense": normal(C, N + 8)[:, :N]},
        "bias": {"bias": None},
        "moved bias": {"bias": moved},
        "output": {"output": "rows"},
        "algorithm": {"algorithm": Algorithm(3)},
    }[change]
    for _ in range(2):
        result = bench.lt.multiply(compressed, (R, C), **arguments)
        assert_close(result, expected(a, arguments["dense"], arguments["bias"]))
    assert bench.fake.calls["matmul_plan_init"] == 2


def test_the_plans_used_last_stay_and_the_others_are_destroyed_in_order() -> None:
    bench = Bench(capacity=2)
    compressed = bench.lt.compress(sparse())
    narrow, middle, wide = (normal(C, n) for n in (8, 16, 24))
    for dense in (narrow, middle, narrow, wide):  # middle is the one used least lately
        bench.lt.multiply(compressed, (R, C), dense)
    assert bench.fake.destroyed == ["plan", "selection", "product", "matrix", "matrix", "matrix"]
    before = bench.fake.calls["matmul_plan_init"]
    bench.lt.multiply(compressed, (R, C), narrow)
    assert bench.fake.calls["matmul_plan_init"] == before
    bench.lt.multiply(compressed, (R, C), middle)
    assert bench.fake.calls["matmul_plan_init"] == before + 1
    bench.lt.close()
    bench.fake.assert_clean()
    assert bench.fake.destroyed[-1] == "handle"
    bench.lt.compress(sparse())  # starts again
    bench.lt.close()
    bench.fake.assert_clean()


def test_what_the_library_refuses_is_destroyed_and_named(bench: Bench) -> None:
    compressed = bench.lt.compress(sparse())
    alive = len(bench.fake.things)
    with pytest.raises(RuntimeError, match=r"refuses PlanKey\(rows=32.*config_id=99.*\): CONFIG_ID 99\."):
        bench.lt.multiply(compressed, (R, C), normal(C, N), algorithm=Algorithm(99))
    assert len(bench.fake.things) == alive
    with pytest.raises(RuntimeError, match="cannot compress a matrix: the matrix is not 2:4"):
        bench.lt.compress(torch.ones(R, C).half())


def test_algorithms_are_counted_for_a_key_and_set(bench: Bench) -> None:
    dense = normal(C, N)
    key = bench.lt.key((R, C), dense)
    assert (key.rows, key.columns, key.n) == (R, C, N)
    assert (key.dense_order, key.dense_leading, key.output_order, key.output_leading) == ("rows", N, "columns", R)
    assert not bench.fake.calls
    assert bench.lt.algorithm_count(key) == 8
    assert bench.lt.algorithm_count(replace(key, dense_order="columns", dense_leading=C)) == 7
    compressed = bench.lt.compress(sparse())
    for algorithm in (Algorithm(), Algorithm(7), Algorithm(0, 2, 1), Algorithm(None, -1)):
        bench.lt.multiply(compressed, (R, C), dense, algorithm=algorithm)
    got = [(launch.config_id, launch.split) for launch in bench.fake.launches]
    assert got == [(None, (1, 0)), (7, (1, 0)), (0, (2, 1)), (None, (-1, 0))]


@pytest.mark.parametrize(
    ("algorithm", "text"),
    [(Algorithm(), ""), (Algorithm(0), "0"), (Algorithm(7, 2, 1), "7/2/1"), (Algorithm(None, 4), "/4/0")],
)
def test_an_algorithm_is_read_back(algorithm: Algorithm, text: str) -> None:
    assert str(algorithm) == text
    assert Algorithm.parse(text) == algorithm


@pytest.mark.parametrize("text", ["x", "1/2", "1/2/3/4", "1//"])
def test_nonsense_is_no_algorithm(text: str) -> None:
    with pytest.raises(ValueError, match=r"algorithm is .*: it must be"):
        Algorithm.parse(text)
