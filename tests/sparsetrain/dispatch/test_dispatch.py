import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from simulated_backend import SimulatedBackend
from torch import Tensor, nn

import sparsetrain as st
from sparsetrain.backends import BACKENDS, MaskedBackend
from sparsetrain.dispatch import Choice, Decision, DispatchTable, Problem, Tuner, bucket, find_mismatch
from sparsetrain.matmul import choices

CPU = torch.device("cpu")
PROBLEM = Problem("forward", (64, 32), 100, torch.bfloat16, bias=True)


class Times:
    """A stopwatch that reads what the test says; it calls what it times, as a real one does."""

    def __init__(self, *milliseconds: float) -> None:
        self.left = list(milliseconds)

    def __call__(self, call) -> float:
        call()
        return self.left.pop(0)


def tuner(simulated: SimulatedBackend, *times: float, table: DispatchTable | None = None) -> Tuner:
    backends = {"simulated": simulated, "masked": MaskedBackend()}
    return Tuner(table or DispatchTable(), "here", stopwatch=Times(*times), backends=backends)


def test_the_fastest_right_candidate_is_chosen_and_remembered() -> None:
    chooser = tuner(SimulatedBackend(algorithms=("0", "1", "2")), 4.0, 3.0, 1.0, 2.0)
    assert str(chooser.choose(PROBLEM, CPU)) == "simulated:1"
    assert str(chooser.choose(PROBLEM, CPU)) == "simulated:1"  # no times are left to measure again
    decision = chooser.table.find("here", PROBLEM.key)
    assert decision.milliseconds == {"masked": 4.0, "simulated:0": 3.0, "simulated:1": 1.0, "simulated:2": 2.0}
    assert decision.speedup == 4.0


@pytest.mark.parametrize(("sparse", "expected"), [(1.1, "masked"), (0.99, "masked"), (0.97, "simulated:0")])
def test_dense_wins_unless_it_is_clearly_slower(sparse: float, expected: str) -> None:
    assert str(tuner(SimulatedBackend(), 1.0, sparse).choose(PROBLEM, CPU)) == expected


@pytest.mark.parametrize("product", ["forward", "input_gradient"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_wrong_flaky_and_broken_algorithms_are_denied_with_the_reason(product, dtype) -> None:
    problem = Problem(product, (64, 32), 100, dtype)
    chooser = tuner(SimulatedBackend(algorithms=("wrong", "flaky", "broken", "0")), 4.0, 1.0)
    assert str(chooser.choose(problem, CPU)) == "simulated:0"
    denied = chooser.table.find("here", problem.key).denied
    assert set(denied) == {"simulated:wrong", "simulated:flaky", "simulated:broken"}
    assert denied["simulated:broken"] == "operation not supported"
    assert "bits" in denied["simulated:flaky"]
    assert "wrong" in denied["simulated:wrong"] or "error" in denied["simulated:wrong"]


def test_every_candidate_is_verified_on_fresh_data_in_every_run() -> None:
    seen: list[Tensor] = []

    class Recorder(SimulatedBackend):
        def product(self, operand, rows, *arguments):
            seen.append(rows.clone())
            return super().product(operand, rows, *arguments)

    tuner(Recorder(), 1.0, 0.5).measure(PROBLEM, CPU)
    distinct = {rows.float().sum().item() for rows in seen}
    assert len(distinct) >= 5
    assert {rows.shape[0] for rows in seen} == {PROBLEM.tokens, bucket(PROBLEM.tokens)}


def test_a_backend_that_cannot_run_is_no_candidate() -> None:
    simulated = SimulatedBackend()
    simulated.refusal = "no."
    assert tuner(simulated).candidates(PROBLEM, CPU) == [Choice("masked")]
    assert str(tuner(simulated, 1.0).choose(PROBLEM, CPU)) == "masked"


def test_deterministic_choices_do_not_depend_on_the_clock() -> None:
    for times in ((1.0, 5.0, 0.5), (1.0, 0.5, 5.0)):
        chooser = tuner(SimulatedBackend(algorithms=("wrong", "7", "12")), *times)
        assert str(chooser.choose(PROBLEM, CPU, deterministic=True)) == "simulated:7"


def test_a_named_backend_uses_its_best_right_algorithm() -> None:
    chooser = tuner(SimulatedBackend(algorithms=("0", "1")), 1.0, 5.0, 3.0)
    assert str(chooser.choose(PROBLEM, CPU, "simulated")) == "simulated:1"
    assert str(chooser.choose(PROBLEM, CPU)) == "masked"


def test_a_named_backend_without_a_right_algorithm_is_refused() -> None:
    chooser = tuner(SimulatedBackend(algorithms=("wrong",)), 1.0)
    with pytest.raises(ValueError, match=r"^backend is 'simulated' but no algorithm .* use 'auto' or 'masked'\.$"):
        chooser.choose(PROBLEM, CPU, "simulated")


def test_a_recorded_table_decides_where_nothing_can_be_measured(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "dispatch.json"
    decision = Decision("cusparselt:7", {"masked": 2.0, "cusparselt:7": 1.0, "cusparselt": 1.5}, {"cusparselt:3": "no"})
    DispatchTable(path).record("H200", PROBLEM.key, decision)
    elsewhere = Tuner(DispatchTable(path), "H200")
    assert str(elsewhere.choose(PROBLEM, CPU)) == "cusparselt:7"
    assert str(elsewhere.choose(PROBLEM, CPU, deterministic=True)) == "cusparselt:7"  # "" is the library's own whim
    assert str(Tuner(DispatchTable(path), "A100").choose(PROBLEM, CPU)) == "masked"
    other = Problem("forward", (64, 32), 1000, torch.bfloat16, bias=True)
    assert str(elsewhere.choose(other, CPU)) == "masked"
    assert DispatchTable(path).entries() == {f"H200 | {PROBLEM.key}": decision}


def test_processes_add_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "dispatch.json"
    first, second = DispatchTable(path), DispatchTable(path)
    first.record("a", "x", Decision("masked"))
    second.record("a", "y", Decision("masked"))
    assert set(DispatchTable(path).entries()) == {"a | x", "a | y"}
    assert set(json.loads(path.read_text())) == {"version", "entries"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"dispatch.json", "dispatch.lock"}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 1}', '{"version": 2, "entries": {}}', '{"version": 1, "entries": {"a": {}}}',
     '{"version": 1, "entries": {"a": {"choice": "masked", "milliseconds": {"masked": "fast"}}}}'],
)  # fmt: skip
def test_a_damaged_table_is_measured_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    path = tmp_path / "dispatch.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        table = DispatchTable(path)
    assert table.entries() == {}
    assert "measured again" in caplog.text
    table.record("a", "x", Decision("masked"))
    assert set(DispatchTable(path).entries()) == {"a | x"}


def test_a_folder_that_cannot_be_written_costs_nothing_but_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    table = DispatchTable(tmp_path / "file" / "dispatch.json")
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        table.record("a", "x", Decision("masked"))
    assert table.find("a", "x") == Decision("masked")
    assert "cannot be written" in caplog.text


def test_products_of_different_buckets_dtypes_and_sides_are_decided_apart() -> None:
    problems = [
        Problem(product, (64, 32), tokens, dtype)
        for product in ("forward", "input_gradient", "weight_gradient")
        for tokens in (64, 128)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert len({problem.key for problem in problems}) == len(problems)
    assert [problem.matrix for problem in problems[::4]] == [(64, 32), (32, 64), (64, 64)]


def test_verification_sees_a_single_wrong_number_outside_the_sample() -> None:
    matrix, rows = torch.randn(64, 128), torch.randn(4096, 128)
    exact = rows @ matrix.t()

    def spoilt(x: Tensor) -> Tensor:
        result = x @ matrix.t()
        result[1234, 5] += 0.01
        return result

    assert find_mismatch(lambda x: exact, lambda x: exact, matrix, rows) is None
    assert find_mismatch(spoilt, lambda x: exact, matrix, rows) == "some of its numbers are wrong"
    nan = exact.clone()
    nan[0, 0] = float("nan")
    assert find_mismatch(lambda x: nan, lambda x: exact, matrix, rows)
    assert find_mismatch(lambda x: exact.half(), lambda x: exact, matrix, rows).startswith("it returns")


def test_automatic_layers_follow_the_decisions_and_report_them(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = SimulatedBackend()
    chooser = tuner(simulated, 2.0, 1.0, 1.0, 2.0)  # sparse for the forward product, dense for the input gradient
    monkeypatch.setitem(BACKENDS, "simulated", simulated)
    monkeypatch.setattr(choices, "tuner_for", lambda device: chooser)
    monkeypatch.setattr(choices, "AUTO_DEVICES", ("cpu",))
    model = nn.Sequential(nn.Linear(32, 64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = {"preset": "asp_one_shot", "prune_at": 0}
    training = st.SparseTraining(model, optimizer, method, 4, backend="auto", verbose=False)
    assert training.report.sparse[0].products == "not decided yet"
    x = torch.randn(100, 32, dtype=torch.bfloat16, requires_grad=True)
    y = model(x)
    y.backward(torch.ones_like(y))
    dense = model[0].weight.detach() * model[0].mask
    torch.testing.assert_close(y, F.linear(x, dense, model[0].bias))
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ dense)
    found = training.report.sparse[0].products
    assert found == "forward simulated:0 at 128 tokens, input gradient masked at 128 tokens"
    assert training.report.dense == ()


def test_without_a_gpu_automatic_layers_are_masked_and_touch_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "tuner_for", lambda device: pytest.fail("nothing is to be measured"))
    model = nn.Sequential(nn.Linear(32, 64))
    st.sparsify_(model, verbose=False)
    model(torch.randn(4, 32)).sum().backward()
    assert not model[0].operands.is_packed


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        DispatchTable(tmp_path / "dispatch.json").record("a", f"problem {number}", Decision("masked"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    assert len(DispatchTable(tmp_path / "dispatch.json").entries()) == 24


@pytest.mark.parametrize("product", ["forward", "input_gradient", "weight_gradient"])
def test_measuring_leaves_random_numbers_as_they_are(product) -> None:
    before = torch.get_rng_state()
    tuner(SimulatedBackend(), 1.0, 0.5).measure(Problem(product, (64, 32), 64, torch.bfloat16), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_want_of_memory_is_no_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Hungry(SimulatedBackend):
        def product(self, *arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

    chooser = tuner(Hungry(), 1.0, table=DispatchTable(tmp_path / "dispatch.json"))
    with caplog.at_level(logging.WARNING, "sparsetrain"):
        assert str(chooser.choose(PROBLEM, CPU)) == "masked"
        assert str(chooser.choose(PROBLEM, CPU)) == "masked"
    assert caplog.text.count("want of memory") == 1
    assert chooser.table.entries() == {}


@pytest.mark.parametrize("error", [RuntimeError("cannot start"), ImportError("no library"), AttributeError("no call")])
def test_a_backend_that_cannot_tell_its_algorithms_is_denied(error: Exception) -> None:
    class Mute(SimulatedBackend):
        def algorithms(self, *arguments):
            raise error

    chooser = tuner(Mute(), 1.0)
    assert str(chooser.choose(PROBLEM, CPU)) == "masked"
    assert chooser.table.find("here", PROBLEM.key).denied == {"simulated": str(error)}


def test_a_decision_for_a_backend_that_is_gone_is_taken_anew() -> None:
    table = DispatchTable()
    table.record("here", PROBLEM.key, Decision("vanished:3", {"vanished:3": 1.0}))
    assert str(tuner(SimulatedBackend(), 2.0, 1.0, table=table).choose(PROBLEM, CPU)) == "simulated:0"
    table.record("here", PROBLEM.key, Decision("vanished:3", {"vanished:3": 1.0}))
    assert str(Tuner(table, "here").choose(PROBLEM, CPU)) == "masked"


def test_weight_gradients_are_verified_and_timed_as_layers_compute_them() -> None:
    seen = []

    class Recorder(SimulatedBackend):
        def product(self, operand, rows, bias=None, algorithm="", transposed_output=False):
            seen.append((operand.shape, tuple(rows.shape), rows.stride(0), transposed_output))
            return super().product(operand, rows, bias, algorithm, transposed_output)

    problem = Problem("weight_gradient", (64, 32), 200, torch.bfloat16)
    assert str(tuner(Recorder(), 2.0, 1.0).choose(problem, CPU)) == "simulated:0"
    assert set(seen) == {((64, 256), (32, 256), 1, True)}


def test_a_choice_that_fails_in_training_is_given_up(monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    class Moody(SimulatedBackend):
        def product(self, operand, rows, *arguments):
            if rows.shape[0] == 72:
                raise RuntimeError("refuses 72 tokens")
            return super().product(operand, rows, *arguments)

    simulated = Moody()
    monkeypatch.setitem(BACKENDS, "simulated", simulated)
    monkeypatch.setattr(choices, "tuner_for", lambda device: tuner(simulated, 2.0, 1.0))
    monkeypatch.setattr(choices, "AUTO_DEVICES", ("cpu",))
    model = nn.Sequential(nn.Linear(32, 64, dtype=torch.bfloat16))
    st.sparsify_(model, verbose=False)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "sparsetrain"):
        for tokens in (100, 72, 72):
            x = torch.randn(tokens, 32, dtype=torch.bfloat16)
            torch.testing.assert_close(model(x), F.linear(x, model[0].weight * model[0].mask, model[0].bias))
    assert caplog.text.count("refuses 72 tokens") == 1
