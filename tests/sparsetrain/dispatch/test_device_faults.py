"""An algorithm that faults takes the device along: it alone is blamed, remembered, and never tried again."""

from pathlib import Path

import pytest
import torch
from simulated_backend import SimulatedBackend

from sparsetrain.backends import MaskedBackend
from sparsetrain.dispatch import Choice, DispatchTable, Problem, Tuner, tuner
from sparsetrain.dispatch.faults import FAULTS, DeviceFaultError, device_works, known_faults, record_fault

CPU = torch.device("cpu")
PROBLEM = Problem("forward", (64, 32), 100, torch.bfloat16)


class FaultyBackend(SimulatedBackend):
    """After algorithm ``"faulty"`` every product fails, as every call on a CUDA context does."""

    def __init__(self, *algorithms: str) -> None:
        super().__init__(algorithms=algorithms)
        self.lost = False
        self.tried: list[str] = []

    def product(self, operand, rows, bias=None, algorithm="", transposed_output=False):
        self.tried.append(algorithm)
        self.lost = self.lost or algorithm == "faulty"
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line")
        return super().product(operand, rows, bias, algorithm, transposed_output)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyBackend:
    backend = FaultyBackend("0", "faulty", "1")
    monkeypatch.setattr(tuner, "device_works", lambda device: not backend.lost)
    return backend


def timed(call) -> float:
    call()
    return 1.0


def chooser(backend: SimulatedBackend, table: DispatchTable) -> Tuner:
    return Tuner(table, "here", stopwatch=timed, backends={"simulated": backend, "masked": MaskedBackend()})


def test_the_algorithm_that_faults_is_named_and_what_comes_after_it_is_not_blamed(faulty, tmp_path: Path) -> None:
    path = tmp_path / "dispatch.json"
    with pytest.raises(DeviceFaultError, match=r"simulated:faulty made cpu unusable .*illegal memory access") as caught:
        chooser(faulty, DispatchTable(path)).choose(PROBLEM, CPU)
    assert "\n" not in str(caught.value)
    assert "start it again" in str(caught.value)
    assert faulty.tried[-1] == "faulty"
    assert "1" not in faulty.tried
    # nothing is decided by what failed for want of a device
    assert list(DispatchTable(path).entries()) == [f"here | {FAULTS}"]

    fresh = FaultyBackend("0", "faulty", "1")  # a new process
    again = chooser(fresh, DispatchTable(path))
    assert again.choose(PROBLEM, CPU) is not None
    assert set(fresh.tried) == {"0", "1"}
    decision = again.table.find("here", PROBLEM.key)
    assert set(decision.milliseconds) == {"masked", "simulated:0", "simulated:1"}
    assert decision.denied == {"simulated:faulty": "CUDA error: an illegal memory access was encountered"}
    other = Problem("input_gradient", (128, 64), 64, torch.float16)
    again.choose(other, CPU)
    assert "faulty" not in fresh.tried


def test_an_algorithm_that_raises_on_a_working_device_is_denied_for_its_problem_alone(tmp_path: Path) -> None:
    backend = SimulatedBackend(algorithms=("broken", "0"))
    table = DispatchTable(tmp_path / "dispatch.json")
    chooser(backend, table).choose(PROBLEM, CPU)
    assert known_faults(table, "here") == {}
    assert table.find("here", PROBLEM.key).denied == {"simulated:broken": "operation not supported"}


def test_faults_add_up_and_belong_to_an_environment() -> None:
    table = DispatchTable()
    record_fault(table, "one", Choice("cusparselt", "7"), "first")
    record_fault(table, "one", Choice("cusparselt", "9"), "second")
    assert known_faults(table, "one") == {"cusparselt:7": "first", "cusparselt:9": "second"}
    assert known_faults(table, "two") == {}


def test_a_device_works_until_a_call_on_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_works(CPU)
    cuda = torch.device("cuda", 0)

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert not device_works(cuda)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(()).fill_(1))
    assert device_works(cuda)


def test_a_benchmark_stops_at_a_fault_with_an_exit_code_of_its_own(
    faulty, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from script_modules import BENCHMARKS, GPU, importable

    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    with importable(BENCHMARKS, GPU) as load:
        gemm, grid = load("gemm"), load("grid")
        shapes = [(64, 32), (32, 64)]
        problem = grid.Grid([64], shapes, [torch.bfloat16], 1, "cpu")
        code = gemm.run(problem, {"simulated": faulty})
        assert code == load("stage").FAULTED == 3
        printed = capsys.readouterr().out
        assert printed.count("simulated:faulty made cpu unusable") == 1
        assert "weight 32x64" not in printed
        fresh = FaultyBackend("0", "faulty", "1")
        assert gemm.run(problem, {"simulated": fresh}) == 0
        assert "faulty" not in fresh.tried
