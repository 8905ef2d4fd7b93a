"""Every kernel is compiled for every architecture, and held to what its machine code used when it was recorded."""

import json
from pathlib import Path

import compile_only
import pytest

BUDGETS, SAID = compile_only.budgets_of(compile_only.triton_version(), compile_only.recorded())
SLACK = {"registers": 1.05, "instructions_per_element": 1.05}
LIMITS = {  # on sm_90: where the arithmetic would take longer than the memory
    "search bfloat16 to codes": {"registers": 48, "instructions_per_element": 19},
    "search and pack bf16 to bf16, both": {"registers": 178, "instructions_per_element": 27},
    "search and pack fp32 to bf16, both": {"registers": 178, "instructions_per_element": 27},
    "search and pack bf16 to bf16, both, measured, cutlass_sm90_4": {"registers": 178, "instructions_per_element": 37},
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "capabilities"),
    [
        pytest.param(name, capabilities, marks=[pytest.mark.sweep] * ((name, *capabilities) != ("pack", 90)))
        for name in compile_only.names()
        for capabilities in ((90,), (80, 89), (100, 120))
    ],
    ids=str,
)
def test_kernels_stay_within_their_budgets(name: str, capabilities: tuple[int, ...]) -> None:
    if SAID:
        print(SAID)
    measured = compile_only.run(name, capabilities)
    assert measured
    every = [(case, capability, measured[case][str(capability)]) for case in measured for capability in capabilities]
    for case, capability, found in every:
        assert found["spills"] == found["local_bytes"] == 0, f"{case} on sm_{capability}: {found}"
        assert found["widest_load_bits"] >= found["vector_bits"], f"{case} on sm_{capability}: {found}"
        assert not (name == "masked_update" and found["shared_bytes"]), f"{case} moves entries between threads: {found}"
        budget = BUDGETS[case][str(capability)]
        for key, slack in SLACK.items():
            assert found[key] <= budget[key] * slack, (
                f"{case} on sm_{capability}: {key} is {found[key]}, the budget is {budget[key]}. {SAID}"
            )


def test_every_architecture_is_compiled_for() -> None:
    assert compile_only.CAPABILITIES == (80, 89, 90, 100, 120)


@pytest.mark.parametrize("version", compile_only.recorded())
def test_every_budget_belongs_to_a_kernel(version: tuple[int, int]) -> None:
    budgets, said = compile_only.budgets_of(version, compile_only.recorded())
    assert not said
    assert set(budgets) == {case.name for name in compile_only.names() for case in compile_only.cases(name)}
    assert all(set(budget) == set(map(str, compile_only.CAPABILITIES)) for budget in budgets.values())


def test_budgets_are_recorded_for_every_triton_that_is_tested() -> None:
    root = Path(__file__).resolve().parents[2]
    pins = [path.read_text() for path in (root / "scripts").glob("constraints*.txt")]
    versions = {tuple(map(int, pin.split("triton==")[1].split(".")[:2])) for pin in pins}
    assert versions == set(compile_only.recorded()) == {(3, 6), (3, 7)}


def test_a_triton_without_budgets_has_the_newest_older_ones_and_says_so(tmp_path: Path) -> None:
    for version, registers in (("3.6", 1), ("3.7", 2), ("3.10", 3)):
        (tmp_path / f"budgets-{version}.json").write_text(json.dumps({"case": registers}))
    records = compile_only.recorded(tmp_path)
    assert list(records) == [(3, 6), (3, 7), (3, 10)]
    for version, registers in (((3, 6), 1), ((3, 7), 2), ((3, 10), 3)):
        assert compile_only.budgets_of(version, records) == ({"case": registers}, "")
    for version, registers, theirs in (((3, 9), 2, "3.7"), ((4, 0), 3, "3.10"), ((3, 5), 1, "3.6")):
        budgets, said = compile_only.budgets_of(version, records)
        assert budgets == {"case": registers}
        assert said == (
            f"Triton {version[0]}.{version[1]} has no budgets of its own: those of {theirs} hold, so record some."
        )


@pytest.mark.parametrize("case", LIMITS)
def test_recorded_budgets_leave_the_memory_as_the_bottleneck(case: str) -> None:
    newest = compile_only.recorded()  # an older compiler may need a few more instructions
    budgets, _ = compile_only.budgets_of(max(newest), newest)
    for key, limit in LIMITS[case].items():
        assert budgets[case]["90"][key] <= limit, f"{case}: {key} is {budgets[case]['90'][key]}, the limit is {limit}"
