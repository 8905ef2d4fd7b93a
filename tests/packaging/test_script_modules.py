"""Every module of ``scripts/`` can be imported, also those that no other test runs."""

from pathlib import Path

import pytest
from script_modules import BENCHMARKS, GPU, REPRODUCTION, importable

from sparsetrain.layers import layer_group

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"benchmarks": BENCHMARKS, "gpu": GPU, "reproduction": REPRODUCTION}
MODULES = [(folder, path.stem) for folder in PACKAGES for path in sorted((ROOT / "scripts" / folder).glob("[!_]*.py"))]


@pytest.mark.parametrize(("folder", "name"), MODULES)
def test_every_module_can_be_imported(folder: str, name: str) -> None:
    with importable(PACKAGES[folder]) as load:
        assert load(name).__doc__


def test_roundings_of_half_precision_are_those_that_runs_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_group, "add_masked_decays_now_", layer_group.add_masked_decays_now_)  # put back behind it
    with importable(REPRODUCTION) as load:
        shrink = load("half_precision").shrink
    left = {rounding: shrink(rounding, steps=100) for rounding in ("float32 weights", "at random", "to nearest")}
    expected = (1 - 0.1 * 2e-4) ** 100
    assert left["float32 weights"] == pytest.approx(expected, rel=1e-6)
    assert left["at random"] == pytest.approx(expected, abs=1e-3)
    assert left["to nearest"] == 1.0  # every step is lost
    assert 1.0 > shrink("remainder beside", steps=600) > 0.98
