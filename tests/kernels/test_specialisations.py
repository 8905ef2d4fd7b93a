"""Every kernel compiles for launches whose integers are 1 or int64, and whose memory is not aligned."""

import compile_only
import pytest
import specialisations
from specialisations import FRONT_END, MACHINE_CODE

NEVER_CONSTANT = {"clock", "seed", "layer"}  # in which every value would be another kernel


@pytest.mark.sweep
def test_every_specialisation_compiles() -> None:
    found = specialisations.run(90)
    errors = {
        f"{case}: {name}": outcome
        for case, outcomes in found.items()
        for name, outcome in outcomes.items()
        if outcome not in (FRONT_END, MACHINE_CODE)
    }
    assert not errors
    launches = [case for file in compile_only.names() for case in compile_only.cases(file)]
    assert set(found) == {case.name for case in launches}
    for kernel in {case.kernel for case in launches}:
        made = [case for case in launches if case.kernel is kernel]
        arguments = {name for name, kind in made[0].signature.items() if kind in ("i32", "i64")} - NEVER_CONSTANT
        alone = {name for case in made for name in found[case.name] if name.endswith(" is 1")}
        assert alone == {f"{name} is 1" for name in arguments}
        assert [sum(outcome == MACHINE_CODE for outcome in found[case.name].values()) for case in made[:1]] == [1]
