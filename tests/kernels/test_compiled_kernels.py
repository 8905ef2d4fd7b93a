"""Every kernel is compiled for every architecture, and held to what its machine code used when it was recorded."""

import json

import compile_only
import pytest

BUDGETS = json.loads(compile_only.BUDGETS.read_text())
SLACK = {"registers": 1.05, "instructions_per_element": 1.05}
LIMITS = {  # on sm_90: where the arithmetic would take longer than the memory
    "search bfloat16 to codes": {"registers": 48, "instructions_per_element": 19},
    "search and pack bf16 to bf16, both": {"registers": 178, "instructions_per_element": 27},
    "search and pack fp32 to bf16, both": {"registers": 178, "instructions_per_element": 27},
    "search and pack bf16 to bf16, both, measured, cutlass_sm90_4": {"registers": 178, "instructions_per_element": 37},
}


@pytest.mark.parametrize("capability", compile_only.CAPABILITIES)
@pytest.mark.parametrize("name", compile_only.names())
def test_kernels_stay_within_their_budgets(name: str, capability: int) -> None:
    measured = compile_only.run(capability, name)
    assert measured
    for case, found in measured.items():
        assert found["spills"] == found["local_bytes"] == 0, f"{case} on sm_{capability}: {found}"
        assert found["widest_load_bits"] >= found["vector_bits"], f"{case} on sm_{capability}: {found}"
        assert not (name == "masked_update" and found["shared_bytes"]), f"{case} moves entries between threads: {found}"
        budget = BUDGETS[case][str(capability)]
        for key, slack in SLACK.items():
            assert found[key] <= budget[key] * slack, (
                f"{case} on sm_{capability}: {key} is {found[key]}, the budget is {budget[key]}"
            )


def test_every_budget_belongs_to_a_kernel() -> None:
    assert all(set(budget) == set(map(str, compile_only.CAPABILITIES)) for budget in BUDGETS.values())


@pytest.mark.parametrize("case", LIMITS)
def test_recorded_budgets_leave_the_memory_as_the_bottleneck(case: str) -> None:
    for key, limit in LIMITS[case].items():
        assert BUDGETS[case]["90"][key] <= limit, f"{case}: {key} is {BUDGETS[case]['90'][key]}, the limit is {limit}"
