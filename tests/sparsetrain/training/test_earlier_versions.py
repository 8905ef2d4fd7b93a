"""Checkpoints of earlier versions: they load, and the run goes on as it did there."""

from pathlib import Path
from typing import Any

import earlier_states
import pytest
import torch
from earlier_states import AFTER, RUNS, STOP, Run

from sparsetrain.training.state_versions import STATE_VERSION

FOLDER = Path(earlier_states.__file__).parent
OTHERWISE = {(3, "step")}  # where Adam goes on for entries whose second moment had not settled, since version 4


def written(version: int) -> dict[str, Any]:
    return earlier_states.read(FOLDER / f"version{version}.pt.gz")


def require_close(run: Run, weights: list[torch.Tensor]) -> None:
    # not bit by bit: other processors round AdamW's steps otherwise, by 3e-8; a lost moment would be 1e-3
    for ours, theirs in zip(run.weights(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
        assert torch.equal(ours == 0, theirs == 0)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("version", [3, 4, 5, 6, 7, 8, 9, 10])
def test_a_run_goes_on_as_it_did_there(version: int, name: str) -> None:
    entry = written(version)[name]
    assert entry["saved"]["training"]["version"] == version
    run = Run(name, entry["saved"])
    assert run.training.clock == STOP
    assert run.training.state_dict()["version"] == STATE_VERSION
    run.go_on(STOP, STOP + AFTER)
    assert run.training.metrics()["violations"] == 0
    if (version, name) not in OTHERWISE:
        require_close(run, entry["weights"])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_what_it_did_there_from_the_beginning(name: str) -> None:
    run = Run(name)
    run.go_on(0, STOP + AFTER)
    require_close(run, written(10)[name]["weights"])


@pytest.mark.parametrize("version", [3, 4, 5])
def test_what_an_optimizer_knew_of_adapters_that_it_owned_always_is_kept(version: int) -> None:
    saved = written(version)["slope"]["saved"]
    run = Run("slope", saved)
    assert run.optimizer.state_dict()["state"].keys() == {0, 1, 2, 3}
    states = run.training.state_dict()["modifiers"]["adapters"]["optimizer"]
    known = [own for name in ("0", "2") for own in states[name]]
    for own, wanted in zip(known, [saved["optimizer"]["state"][number] for number in (4, 5, 6, 7)], strict=True):
        assert own.keys() == wanted.keys()
        assert all(torch.equal(own[key], wanted[key]) for key in own)


@pytest.mark.parametrize("missing", ["decay", "adapters", "soft_scales"])
def test_a_key_that_an_earlier_version_wrote_is_missed(missing: str) -> None:
    saved = written(4)["fst"]["saved"]
    del saved["training"][missing]
    with pytest.raises(ValueError, match=f"^state has no '{missing}': it must be what"):
        Run("fst", saved)


@pytest.mark.parametrize("version", [0, 2, STATE_VERSION + 1, "4", None])
def test_other_versions_are_refused(version: Any) -> None:
    saved = written(4)["fst"]["saved"]
    saved["training"]["version"] = version
    with pytest.raises(ValueError, match=r"^state has version .* but this sparsetrain reads 3 to \d+: use the version"):
        Run("fst", saved)
